"""Text that a user hands to a command: as files, on standard input, as an option."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def read_text(file: str) -> str:
    """Read a text file.

    Args:
        file (str): Its path.

    Returns:
        str: The text.

    Raises:
        ValueError: If it is empty, or not UTF-8 text.
    """
    text = decode(Path(file).read_bytes(), str(file))
    if not text.strip():
        raise ValueError(f"{file} is empty.")
    return text


def read_texts(files: Iterable[str]) -> str:
    """Read text files in their order, as one text.

    Args:
        files (iterable of str): Their paths.

    Returns:
        str: The texts, with a blank line after each but the last.

    Raises:
        ValueError: If one is empty, or not UTF-8 text.
    """
    return "\n\n".join(map(read_text, files))


def read_standard_input() -> str:
    """Read all of standard input.

    Returns:
        str: The text.

    Raises:
        ValueError: If it is not UTF-8 text.
    """
    return decode(sys.stdin.buffer.read(), "Standard input") if sys.stdin else ""


def decode(data: bytes, name: str) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Args:
        data (bytes): The text.
        name (str): What it is, for the message.

    Returns:
        str: The text.

    Raises:
        ValueError: If it is no such text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start:,} is not). Convert it to plain "
            f"UTF-8 text first."
        ) from None
    if "\0" in text:
        raise ValueError(f"{name} is not text: it holds zero bytes.")
    return text


def check_text(text: str, name: str):
    """Refuse what Python takes for text, but no tokenizer can: halves of characters.

    They come from bytes that are not UTF-8, in an option or typed at a terminal.

    Args:
        text (str): The text.
        name (str): What it is, for the message.

    Raises:
        ValueError: If it can't be encoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: character {error.start + 1:,} is half of one, or a "
            f"byte that is none. Leave it out."
        ) from None
