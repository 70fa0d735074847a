"""Where training text comes from: files and datasets, as rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..texts import read_blocks, read_objects
from .report import Report


def read_rows(data: str | os.PathLike, report: Report | None = None) -> Iterator[dict]:
    """Read the rows of a text source one by one.

    Args:
        data (str or PathLike): A ``.txt`` file; a ``.jsonl`` or ``.jsonl.gz``
          file with a JSON object in each line; or else the name of a dataset on
          the hub, with ``:subset`` where it has several, or its local folder. Of
          a dataset, the ``train`` split is read.
        report (Report, optional): Told which row is read, by its line in a file,
          and which lines are no rows. Default: ``None``.

    Yields:
        dict: One row.

    Raises:
        ValueError: If the source is missing or is not text of that kind.
    """
    name = os.fspath(data)
    report = report or Report()
    if name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        if not Path(name).is_file():
            raise ValueError(f"[read_rows] there is no file {name}.")
        yield from (_read_text if name.endswith(".txt") else _read_jsonl)(name, report)
    elif Path(name).is_file():
        raise ValueError(
            f"[read_rows] 'data' must be a .txt, .jsonl or .jsonl.gz file, or a dataset's name, but got {name}."
        )
    else:
        yield from _read_dataset(name, report)


def _read_text(name: str, report: Report) -> Iterator[dict]:
    for number, text in enumerate(read_blocks(name), 1):
        report.begin(number)
        yield {"text": text}


def _read_jsonl(name: str, report: Report) -> Iterator[dict]:
    for number, row, flaw in read_objects(name):
        report.begin(number)
        if row is not None:
            yield row
        elif flaw:
            report.leave_out(flaw, noun="line")


def _read_dataset(name: str, report: Report) -> Iterator[dict]:
    import datasets  # only here: slow to import, and files need it not

    path, _, subset = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        rows = datasets.load_dataset(path, subset or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            report.begin(number)
            yield row
    except Exception as error:  # the library raises many kinds for one thing: no such data
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"[read_rows] dataset {name} cannot be read: {reason[0]} Give a .txt, .jsonl or "
            f".jsonl.gz file, or a dataset's name on the hub."
        ) from None
