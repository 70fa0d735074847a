"""Where the evaluators' texts come from: the bundled books, local files, the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..texts import is_broken, read_blocks, read_objects

BOOKS = Path(__file__).with_name("data") / "books.jsonl.gz"
# Hub names that need a configuration, and where in them the text stands.
HUB: dict[str, tuple[str, str | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "c4": ("allenai/c4", "en", "validation", "text"),
    "gsm8k": ("openai/gsm8k", "main", "test", "question"),
}


@dataclass(frozen=True)
class Document:
    """A text and what to call it."""

    name: str
    text: str


def read_lines(path: str | os.PathLike, strings: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, dict) for each line of a .jsonl or .jsonl.gz file.

    Nothing is left out: what is measured must be the whole of what was given.

    Args:
        path (str or Path): the file.
        strings (list of str): keys whose values must be strings.

    Raises:
        ValueError: at a line that is no JSON object, or lacks a string, with its number.
    """
    for number, row, flaw in read_objects(path):
        place = f"[read_lines] '{path}' line {number}"
        if row is None:
            raise ValueError(f"{place} is {flaw}.")
        if not all(isinstance(row.get(key), str) for key in strings):
            wanted = " and ".join(f'"{key}"' for key in strings)
            raise ValueError(f"{place} has no {wanted}.")
        if any(is_broken(row[key]) for key in strings):
            raise ValueError(f"{place} holds half a character (a lone surrogate).")
        yield number, row


def load_documents(source: str | os.PathLike | None = None, limit: int | None = None) -> list[Document]:
    """Return the texts to read.

    Args:
        source (str): a .txt file, a .jsonl(.gz) file with a "text" in each line, a folder of such
            files, "wikitext2", "c4", or a hub data set. Default: ``None``, the bundled books.
        limit (int): take no more than so many. Default: ``None``.

    Raises:
        ValueError: if there is nothing to read.
    """
    path = Path(source) if source else BOOKS
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.name.endswith((".txt", ".jsonl", ".jsonl.gz")) and not p.name.startswith(".")
        )
        documents = [d for p in files for d in _read_file(p)]
    elif path.exists():
        documents = _read_file(path)
    elif path.suffix in (".txt", ".jsonl", ".gz", ".json"):
        raise ValueError(f"[load_documents] '{source}' is not there.")
    else:
        documents = _read_hub(str(source), limit)
    documents = [d for d in documents if d.text.strip()][:limit]
    if not documents:
        raise ValueError(f"[load_documents] '{source}' holds no text.")
    return documents


def _read_file(path: Path) -> list[Document]:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return [Document(path.name, "".join(read_blocks(path)))]
    return [Document(_title(row) or f"{path.name}:{number}", row["text"]) for number, row in read_lines(path, ["text"])]


def _title(row: Mapping[str, Any]) -> str | None:
    title = row.get("title")
    return title if isinstance(title, str) and not is_broken(title) else None


def _read_hub(source: str, limit: int | None) -> list[Document]:
    name, part, split, column = HUB.get(source, (source, None, "test", "text"))
    rows = load_hub(name, part, split, stream=source != "wikitext2")
    texts = []
    for i, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise ValueError(f"[load_documents] '{source}' has no column '{column}'.")
        texts.append(Document(f"{source}:{i}", row[column]))
        if limit and source != "wikitext2" and i + 1 == limit:
            break
    # WikiText's rows are lines of one running text.
    return [Document(source, "".join(d.text for d in texts))] if source == "wikitext2" else texts


def windows_of(
    documents: Iterable[Document], tokenizer: Any, size: int, stride: int, limit: int | None
) -> list[dict[str, Any]]:
    """Cut texts into windows of `size` tokens, `stride` apart, and spread `limit` of them evenly.

    Raises:
        ValueError: if no text is long enough.
    """
    windows: list[dict[str, Any]] = []
    for document in documents:
        ids = list(tokenizer.encode(document.text, add_special_tokens=False, verbose=False))
        windows += [
            {"document": document.name, "start": at, "ids": ids[at : at + size]}
            for at in range(0, len(ids) - size + 1, stride)
        ]
    if not windows:
        raise ValueError(f"[windows_of] no text has {size:,} tokens. Use shorter --lengths, or longer texts.")
    if limit and limit < len(windows):
        windows = [windows[i * len(windows) // limit] for i in range(limit)]
    return windows


def load_hub(name: str, part: str | None, split: str, stream: bool = False) -> Any:
    """Open a data set of the hub.

    Raises:
        ValueError: if it cannot be had, in one line.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, part, split=split, streaming=stream)
    except Exception as error:  # the hub's client raises many kinds, all of which mean: not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"[load_hub] '{name}' is neither a file here nor to be had from the hub: {reason}") from None
