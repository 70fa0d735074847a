"""Text files as users have them: what is no text in them is named by its place."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

# Characters in which a text is handed on. A line that is longer than the second comes in
# parts, so that memory has a bound.
_BLOCK = 1 << 16
LONGEST = 1 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Line(NamedTuple):
    """A line of a file of JSON objects.

    Args:
        number (int): Its number in the file, from 1.
        row (dict, optional): The object; ``None`` where there is none.
        flaw (str, optional): Else what the line is, such as ``"not JSON"``.
    """

    number: int
    row: dict | None
    flaw: str | None


def read_blocks(path: str | os.PathLike) -> Iterator[str]:
    """Read a text file in blocks of lines.

    Args:
        path (str or PathLike): A file in UTF-8, with a byte order mark or without.

    Yields:
        str: A part of the text.

    Raises:
        ValueError: If the file cannot be read, or something in it is no text.
    """
    parts, size = [], 0
    for number, part in _read_lines(path, LONGEST):
        if "\0" in part or is_broken(part):
            what = "zero bytes" if "\0" in part else "bytes that are not UTF-8"
            raise ValueError(f"{path} cannot be read: line {number} holds {what}. Save it as plain text in UTF-8.")
        parts.append(part)
        size += len(part)
        if size > _BLOCK:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def read_objects(path: str | os.PathLike) -> Iterator[Line]:
    """Read a file with a JSON object in each line; empty lines are passed over.

    Args:
        path (str or PathLike): A file in UTF-8, with a byte order mark or without. One
          whose name ends in ``.gz`` is unpacked.

    Yields:
        Line: An object, or what stands in its place.

    Raises:
        ValueError: If the file cannot be read to its end.
    """
    for number, line in _read_lines(path):
        if line.strip():
            row, flaw = _parse(line)
            yield Line(number, row, flaw)


def is_broken(text: str) -> bool:
    """Tell whether a text holds a lone surrogate: half a character, or an undecoded byte."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def _parse(line: str) -> tuple[dict | None, str | None]:
    if is_broken(line):
        return None, "not UTF-8"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, "not JSON"
    return (row, None) if isinstance(row, dict) else (None, "not a JSON object")


def _read_lines(path: str | os.PathLike, longest: int = -1) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers; a byte that is not UTF-8 becomes a lone surrogate."""
    number = 1
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            if file.read(2) in _UTF_16:
                raise ValueError(f"{path} cannot be read: it is in UTF-16. Save it as plain text in UTF-8.")
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(longest):
                yield number, line
                number += line.endswith("\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        after = f" after line {number - 1:,}" if number > 1 else ""
        raise ValueError(f"{path} cannot be read{after}: {reason}.") from None
