"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What file managers, network drives and git users leave in folders.
_DROPPINGS = (
    ".ds_store .localized .directory .gitkeep icon\r thumbs.db ehthumbs.db desktop.ini "
    ".spotlight-v100 .fseventsd .trashes"
).split(" ")


def is_dropping(name: str) -> bool:
    """Tell whether a name in a folder is one that nobody put there as content.

    Args:
        name (str): A file's name, without its folder.

    Returns:
        bool: Whether a folder that holds only such files counts as empty.
    """
    return name.lower() in _DROPPINGS or name.startswith(("._", ".nfs"))


@contextmanager
def replacing(
    path: str | os.PathLike, *, suffix: str | None = None, shared: bool = False
) -> Iterator[Path]:
    """Give a file to write to, which at the end replaces another in one step.

    On an error it is removed, and the other stays as it was.

    Args:
        path (str or PathLike): The file to replace; its folder must be there.
        suffix (str, optional): Of the file to write to. Default: ``None``, that of ``path``.
        shared (bool): Whether several processes may write it at once: each gets a file
          of its own. Else what a killed process left is written over.
          Default: ``False``.

    Yields:
        Path: The file to write to, beside ``path``.
    """
    path = Path(path)
    own = f".{os.getpid()}" if shared else ""
    part = path.with_name(f"{path.stem}{own}.part{path.suffix if suffix is None else suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
