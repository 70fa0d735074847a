"""The bars that show how much is done: of a prompt, or of many steps of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def reading_bar(label: str = "Reading") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the terminal's standard error until the prompt is read.

    Args:
        label (str): What stands before the bar. Default: ``"Reading"``.

    Yields:
        Callable: Takes the tokens read and their number. The bar goes away when
        all are read, or when the context ends.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(label)

    def update(done: int, total: int):
        if done >= total:
            bar.stop()
        elif bar.console.is_terminal:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def counting_bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal until the context ends.

    Args:
        console (Console): Where; what is printed to it stands above the bar.

    Yields:
        Callable: Takes how much is done, of how much, and what runs.
    """
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    task = bar.add_task("")
    if console.is_terminal:
        bar.start()
    try:
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )
    finally:
        bar.stop()
