"""What all trained files of a model have in common: a safetensors file and its run_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .files import replacing

INDEXERS = "indexers.safetensors"  # the file in a folder
RUN_CONFIG = "run_config.json"  # beside it
# What a file holds, by the rule of selecting that reads it. One that does not say has indexers.
KIND, LIGHTNING, PROJECTIONS = "kind", "lightning", "projections"
DOUBLE_SPARSITY, MINFERENCE, MIXTURE = CALIBRATED = ("double_sparsity", "minference", "mixture")  # mlx-dsa calibrate
_NAMES = {LIGHTNING: "lightning indexers", PROJECTIONS: "search projections"}
_NAMES |= {DOUBLE_SPARSITY: "channels of keys", MINFERENCE: "patterns of heads", MIXTURE: "windows of heads"}
_MADE_BY = {LIGHTNING: "mlx-dsa train", PROJECTIONS: "mlx-dsa train --rule projections"}
_MADE_BY |= {rule: f"mlx-dsa calibrate --rule {rule}" for rule in (DOUBLE_SPARSITY, MINFERENCE, MIXTURE)}
_FOREIGN = (".pt", ".pth", ".bin", ".gguf")  # what mlx-dsa convert reads


def read_header(file: Path) -> tuple[dict[str, str], list[str]]:
    """Return a file's metadata, and the names of its tensors."""
    try:
        with safe_open(file, framework="numpy") as header:
            return header.metadata() or {}, list(header.keys())
    except (SafetensorError, OSError) as error:
        if file.suffix in _FOREIGN:
            raise ValueError(
                f"[load_indexers] {file} is of another system. Convert it first: mlx-dsa convert."
            ) from None
        raise ValueError(
            f"[load_indexers] {file} is damaged or not a safetensors file ({error}). Download or copy it again."
        ) from None


def write_checkpoint(
    path: Path,
    tensors: dict[str, mx.array],
    header: dict[str, str],
    run_config: Mapping[str, Any],
) -> Path:
    """Write a file and its ``run_config.json``; return the file that :func:`file_of` names."""
    file = file_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Neither takes its place before both are written.
    with replacing(file.with_name(RUN_CONFIG)) as config, replacing(file) as part:
        mx.save_safetensors(str(part), tensors, header)
        config.write_text(json.dumps(run_config, indent=2) + "\n", encoding="utf-8")
    return file


def file_of(path: Path) -> Path:
    """Return the safetensors file that a path to write to means: itself, or one in a folder."""
    return path if path.suffix == ".safetensors" else path / INDEXERS


def check_kind(file: Path, wanted: str):
    """Refuse a file that is for another rule of selecting than ``wanted``."""
    kind = read_header(file)[0].get(KIND, LIGHTNING)
    if kind not in _NAMES:
        raise ValueError(f"[load_indexers] {file} holds {kind!r}, which this version does not know. Upgrade mlx-dsa.")
    if kind != wanted:
        raise ValueError(
            f"[load_indexers] {file} holds {_NAMES[kind]}, not {_NAMES[wanted]}. Use "
            f"select='{kind}', or name another file (--indexer); {_MADE_BY[wanted]} makes one for '{wanted}'."
        )


def find_file(path: Path) -> Path:
    """Return the safetensors file that a path to read from means; raise ValueError if none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"[load_indexers] there is no file or folder {path}.")
    found = sorted(path.glob("*.safetensors"))
    named = [f for f in found if f.name == INDEXERS]
    if len(named or found) != 1:
        raise ValueError(f"[load_indexers] {path} must hold one .safetensors file but has {len(found)}. Name the file.")
    return (named or found)[0]
