"""Files that are on this machine, or fetched from the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MODEL_FILES = ("*.json", "*.jinja", "*.txt", "model*.safetensors", "tokenizer.model")
INDEXER_FILES = ("*.json", "*.safetensors")
# Those of a model's JSON files that hold an object.
_OBJECTS = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip


def check_place(name: str) -> Path:
    """Return a name as a path.

    Raises:
        FileNotFoundError: If it is neither there nor the name of a repository.
    """
    path = Path(name).expanduser()
    if not path.exists() and not is_repository(name):
        raise FileNotFoundError(f"[mlx-dsa] there is no file or folder {name}.")
    return path


def fetch(name: str, patterns: tuple[str, ...] = MODEL_FILES, *, download: bool = True) -> Path:
    """Find a folder or file, or fetch a hub repository.

    Args:
        name (str): A path, or a hub repository such as ``"owner/name"``.
        patterns (tuple of str): Files to fetch of a repository. Default: what
          mlx-lm needs of a model.
        download (bool): Fetch what is not on this machine. Default: ``True``.

    Returns:
        Path: Where it is on this machine.

    Raises:
        FileNotFoundError: If there is no such path or repository, or it is not
          on this machine and may not be fetched.
    """
    path = check_place(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(patterns),
                local_files_only=not download,
            )
        )
    # The hub's errors are OSErrors or ValueErrors, whichever client it uses.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"[mlx-dsa] {name} is no folder here and could not be fetched from the "
            f"Hugging Face hub: {first_line(error)}"
        ) from error


def is_repository(name: str) -> bool:
    """Return whether a name that is no path here can be one on the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def first_line(error: BaseException) -> str:
    """Return what an error says, without what follows its first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model's folder.

    Args:
        file (Path): It.

    Returns:
        dict: Its object.

    Raises:
        ValueError: If it can't be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {first_line(error)}. Download or copy it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object. Download or copy it again.")
    return found


def flawed_json(folder: Path) -> str | None:
    """Say which JSON file of a model's folder can't be what it should, and why.

    Args:
        folder (Path): With ``config.json`` and others.

    Returns:
        str, optional: What :func:`read_object` says of it; ``None`` if all hold an object.
    """
    for name in _OBJECTS:
        if (folder / name).exists():
            try:
                read_object(folder / name)
            except ValueError as error:
                return str(error)
    return None
