"""Safetensors files with a checksum of every byte: what is damaged is never read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .files import replacing

_NAME = "checksum"
_BLANK = b"0" * 64
# In a header of JSON a quotation mark inside a string has a backslash before it, so no
# other text of the header looks like this.
_PLACE = re.compile(rb'"%s":"([0-9a-f]{64})"' % _NAME.encode())
_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_BLOCK = 1 << 20


class Damaged(ValueError):
    """A file whose bytes are not those that were written."""


class NotSealed(ValueError):
    """A file without a checksum where it would be."""


def write_sealed(
    path: str | os.PathLike,
    arrays: Mapping[str, mx.array],
    header: Mapping[str, str],
    durable: bool = True,
):
    """Write a safetensors file, as a whole or not at all.

    Args:
        path (str or PathLike): The file; one that exists is replaced in one step.
        arrays (Mapping): What it holds.
        header (Mapping): Strings for its header.
        durable (bool): As in :func:`replacing`. Default: ``True``.

    Raises:
        OSError: If it can't be written.
        RuntimeError: Likewise, from MLX.
    """
    with replacing(path, suffix=".safetensors", durable=durable) as part:
        mx.save_safetensors(str(part), dict(arrays), {**header, _NAME: _BLANK.decode()})
        place, _, digest = _digest(part)
        with part.open("r+b") as file:
            file.seek(place)
            file.write(digest)


def read_sealed(path: str | os.PathLike) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a file of which every byte is as :func:`write_sealed` left it.

    Args:
        path (str or PathLike): The file.

    Returns:
        tuple: The arrays, not yet in memory, and the header.

    Raises:
        NotSealed: If it was not written so, or its beginning is damaged.
        Damaged: If it is damaged.
        OSError: If it can't be read.
    """
    _, stored, digest = _digest(Path(path))
    if stored != digest:
        raise Damaged
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)  # of its forms, a pair
    return loaded


def peek_sealed(path: str | os.PathLike) -> dict[str, str]:
    """Read the header of a file that :func:`write_sealed` wrote, of which nothing is verified.

    Args:
        path (str or PathLike): The file.

    Returns:
        dict: Its strings.

    Raises:
        NotSealed: If it was not written so, or its beginning is damaged.
        OSError: If it can't be read.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _LARGEST_HEADER else b""
    try:
        strings = json.loads(header)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotSealed from None
    if _PLACE.search(header) is None or not all(isinstance(text, str) for text in strings.values()):
        raise NotSealed
    return strings


def _digest(path: Path) -> tuple[int, bytes, bytes]:
    """Return where a file's checksum stands, what stands there, and what should."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= _LARGEST_HEADER else b""
        found = _PLACE.search(header)
        if found is None:
            raise NotSealed
        digest.update(start)
        digest.update(header[: found.start(1)] + _BLANK + header[found.end(1) :])
        while block := file.read(_BLOCK):
            digest.update(block)
    return 8 + found.start(1), found[1], digest.hexdigest().encode()
