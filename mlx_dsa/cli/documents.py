"""Text that a user hands to a command: as files, on standard input, as an option."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..texts import is_broken, read_blocks


def read_text(file: str) -> str:
    """Read a text file.

    Args:
        file (str): Its path.

    Returns:
        str: The text.

    Raises:
        ValueError: If it can't be read, is empty, or something in it is no text.
    """
    text = "".join(read_blocks(file))
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
    if is_broken(text):
        at = next(i for i, character in enumerate(text, 1) if is_broken(character))
        raise ValueError(
            f"{name} is not UTF-8 text: character {at:,} is half of one, or a byte that is "
            f"none. Leave it out."
        )
