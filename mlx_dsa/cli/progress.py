"""The bars that show how much is done: of a prompt, or of many steps of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
        TextColumn("tokens, left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(label)

    def update(done: int, total: int) -> None:
        if done >= total:
            bar.stop()
        elif bar.console.is_terminal:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


class ReadingLines:
    """Lines on standard error, seldom, that tell how much is read: for a log.

    Called with the tokens read and their number.

    Args:
        every (float): Seconds between two lines at least.
    """

    def __init__(self, every: float):
        self._every = every
        self._begin: tuple[float, int] | None = None  # when, and what was read by then
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._begin is None:
            self._begin, self._told = (now, done), now
        start, first = self._begin
        if now - self._told < self._every or not first < done < total:
            return
        self._told = now
        left = round((now - start) * (total - done) / (done - first))
        hours, minutes = divmod(left // 60, 60)
        click.echo(
            f"{done:,} of {total:,} tokens read, {hours}:{minutes:02}:{left % 60:02} left.",
            err=True,
        )


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
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
    finally:
        bar.stop()
