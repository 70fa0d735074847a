"""The metadata of GGUF files, without their tensors."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

# Codes of types -> how `struct` reads them, little-endian.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST, _MOST_TEXT = 1 << 48, 1 << 28  # bytes of an array, and of a text


def read_metadata(file: str | os.PathLike) -> dict[str, Any]:
    """Read what a GGUF file says of itself.

    Args:
        file (str or PathLike): The file.

    Returns:
        dict: Keys to numbers, truths and texts; arrays, as of a tokenizer, are left out.

    Raises:
        ValueError: If it is no GGUF file of version 2 or 3, or is damaged.
    """
    with Path(file).open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"[gguf] {file} is not a GGUF file.")
        try:
            version, _, n_pairs = _unpack(stream, "IQQ")
            if version not in _VERSIONS:
                raise ValueError(f"[gguf] {file} is of version {version}, not 2 or 3.")
            pairs = [_pair(stream) for _ in range(n_pairs)]
        except (struct.error, UnicodeDecodeError, KeyError, RecursionError):
            raise ValueError(f"[gguf] {file} is damaged. Download or copy it again.") from None
    return {key: value for key, value in pairs if value is not None}


def _pair(stream) -> tuple[str, Any]:
    key = _text(stream)
    (kind,) = _unpack(stream, "I")
    if kind == _STRING:
        return key, _text(stream)
    if kind != _ARRAY:
        return key, _unpack(stream, _NUMBERS[kind])[0]
    _skip(stream)
    return key, None


def _skip(stream):
    """Pass over an array."""
    kind, n = _unpack(stream, "IQ")
    if kind in _NUMBERS:
        _pass(stream, n * struct.calcsize(_NUMBERS[kind]))
        return
    if kind not in (_STRING, _ARRAY):
        raise KeyError(kind)
    for _ in range(n):
        if kind == _ARRAY:
            _skip(stream)
        else:
            _pass(stream, _unpack(stream, "Q")[0])


def _pass(stream, n: int):
    if n > _MOST:
        raise struct.error
    stream.seek(n, os.SEEK_CUR)


def _text(stream: BinaryIO) -> str:
    (n,) = _unpack(stream, "Q")
    text = stream.read(min(n, _MOST_TEXT))
    if len(text) < n:
        raise struct.error
    return text.decode("utf-8")


def _unpack(stream: BinaryIO, form: str) -> tuple:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))
