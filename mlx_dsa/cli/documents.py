"""Text that a user hands to a command: as files, on standard input, as an option."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from ..files import is_dropping
from ..texts import is_broken, read_blocks

_SHOWN = 10  # of what is left out


class Document(NamedTuple):
    """What files and folders make as one text.

    Args:
        text (str): The text; where it is more than one file, each begins with a heading.
        sections (list of tuple): Of each file its name and where it begins in the text, in
          characters; empty where the text is one file's as it is.
        skipped (list of str): What in folders is left out, and why.
        name (str): What it is, in a few words.
    """

    text: str
    sections: list[tuple[str, int]]
    skipped: list[str]
    name: str


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


def read_document(paths: Sequence[str], but: Iterable[str | os.PathLike] = ()) -> Document:
    """Read files, and the text files in folders, as one document.

    A folder's files come in the order of their paths, those of folders in it too; hidden
    ones, what is no text, and a file under a second name, are left out. A heading is a file's path from the folder that
    holds all of them.

    Args:
        paths (sequence of str): Files and folders, at least one.
        but (iterable of path): Files that are left out of folders: what is written.
          Default: none.

    Returns:
        Document: The text, and what is not in it.

    Raises:
        ValueError: If a path can't be read, a file that is named is no text, two paths hold
          the same one, or a folder holds no text file.
    """
    written = {os.path.realpath(path) for path in but}
    texts: dict[str, str] = {}
    names: list[str] = []
    skipped: list[str] = []
    for path in paths:
        n_read, n_skipped, earlier = len(texts), len(skipped), set(texts)
        is_folder = os.path.isdir(path)
        for file in _files_in(path, skipped) if is_folder else [path]:
            place = os.path.realpath(file)
            if place in written and is_folder:
                continue
            if place in written:
                raise ValueError(f"{file} would be written over. Name another output.")
            if place in earlier:
                raise ValueError(f"{file} is there twice. Name it once.")
            if place in texts:  # a link, or what one leads to: nobody named it
                skipped.append(f"{file} is there under another name.")
                continue
            try:
                texts[place] = read_text(file)
                names.append(os.path.abspath(file))
            except ValueError as error:
                if not is_folder:
                    raise
                skipped.append(str(error))
        if len(texts) == n_read:
            raise ValueError(f"{path} holds no text file.{_reasons(skipped[n_skipped:])}")
    if len(paths) == 1 and not os.path.isdir(paths[0]):
        (text,) = texts.values()
        return Document(text, [], skipped, Path(paths[0]).name)
    return _joined(names, texts.values(), skipped)


def tell_skipped(document: Document) -> None:
    """Tell on standard error what is left out of a document, and why."""
    for reason in document.skipped[:_SHOWN]:
        click.echo(f"Left out: {reason}", err=True)
    more = len(document.skipped) - _SHOWN
    if more > 0:
        click.echo(f"Left out: {more:,} more.", err=True)


def _joined(names: list[str], texts: Iterable[str], skipped: list[str]) -> Document:
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    parts: list[str] = []
    sections, at = [], 0
    for path, text in zip(names, texts):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        sections.append((name, at))
        parts.append(f"# {name}\n\n{text.strip()}\n\n")
        at += len(parts[-1])
    first, n = sections[0][0], len(sections) - 1
    more = f" and {n:,} more file{'s' * (n > 1)}" if n else ""
    return Document("".join(parts), sections, skipped, f"{first}{more}")


def _files_in(folder: str, skipped: list[str]) -> Iterator[str]:
    """Return the files of a folder in order; add what is hidden or special to ``skipped``."""
    found = []

    def note(path: str, why: str) -> None:
        if not is_dropping(os.path.basename(path)):
            skipped.append(f"{path} {why}.")

    def fail(error: OSError) -> None:
        skipped.append(f"{error.filename} cannot be read: {error.strerror}.")

    for place, folders, files in os.walk(folder, onerror=fail):
        for name in [name for name in folders if name.startswith(".")]:
            note(os.path.join(place, name), "is hidden")
            folders.remove(name)
        for name in [n for n in folders if os.path.islink(os.path.join(place, n))]:
            note(os.path.join(place, name), "is a link to a folder")
        for name in files:
            path = os.path.join(place, name)
            if name.startswith("."):
                note(path, "is hidden")
            elif os.path.exists(path) and not os.path.isfile(path):  # a pipe has no end
                note(path, "is no file")
            elif not is_dropping(name):
                found.append(path)
    skipped.sort()
    return iter(sorted(found, key=lambda path: Path(path).parts))


def _reasons(skipped: Sequence[str]) -> str:
    more = f" (and {len(skipped) - 1:,} more)" if len(skipped) > 1 else ""
    return f" {skipped[0]}{more}" if skipped else ""


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
            f"{name} is not UTF-8 text (byte {error.start:,} is not). Convert it to plain UTF-8 text first."
        ) from None
    if "\0" in text:
        raise ValueError(f"{name} is not text: it holds zero bytes.")
    return text


def check_text(text: str, name: str) -> None:
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
            f"{name} is not UTF-8 text: character {at:,} is half of one, or a byte that is none. Leave it out."
        )
