"""Answers and their figures side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from .stats import Report, entries, megabytes


@dataclass
class Column:
    """One side: its answer so far, and at the end its figures."""

    name: str
    answer: str = ""
    status: str = "waiting"
    report: Report | None = None

    def read(self, done: int, total: int) -> None:
        """Note how much of the prompt has been read."""
        self.status = f"reading, {done:,} of {total:,} tokens" if done < total else ""


def columns(sides: list[Column]) -> Table:
    """Return the table that shows the sides next to each other."""
    table = Table(expand=True)
    table.add_column("")
    for side in sides:
        table.add_column(side.name, ratio=1, overflow="fold")
    table.add_row("answer", *(Text(s.answer.strip() or s.status) for s in sides))
    table.add_section()
    for name, figure in _FIGURES:
        cells = ("" if s.report is None else figure(s.report) for s in sides)
        table.add_row(name, *cells)
    return table


def _reading(report: Report) -> str:
    return f"{report.prompt_tokens:,} in {report.first:.2f} s"


def _writing(report: Report) -> str:
    seconds = report.tokens / report.generation_tps if report.generation_tps else 0.0
    return f"{report.tokens:,} in {seconds:.2f} s" + (", then cut" if report.cut else "")


_FIGURES = (
    ("tokens read", _reading),
    ("tokens written", _writing),
    ("entries a layer", entries),
    ("KV memory", lambda report: megabytes(report.kv_bytes)),
)
