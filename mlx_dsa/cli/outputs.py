"""Where results go: checked before the work is done, not after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click


class OutputPath(click.ParamType):
    """A file or folder that a command will write.

    Args:
        folder (bool): Whether it is a folder. Default: ``False``.
    """

    def __init__(self, folder: bool = False):
        self.folder = folder
        self.name = "folder" if folder else "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path as it was given."""
        check_output(value, folder=self.folder)
        return value


def check_output(path: str | os.PathLike, *, folder: bool = False) -> None:
    """Refuse a path that nothing can be written to; folders on the way are yet to be made.

    Args:
        path (str or PathLike): The file or folder to write.
        folder (bool): Whether it is a folder. Default: ``False``.

    Raises:
        ValueError: If it is of the other kind, or its folder can't be written to.
    """
    path = Path(path)
    place = path if folder else path.parent
    try:
        if path.is_dir() and not folder:
            raise ValueError(f"{path} is a folder. Name a file.")
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{path} can't be written: {place} is a file.")
        # Only a file tells: permissions say nothing to root, or of a disk mounted read-only.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} can't be written: nothing can be made in {place} ({error.strerror}). Choose another folder."
        ) from None
