"""What commands that read a corpus in steps have in common: their options, bar and Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..presets import preset_names
from .interrupt import Interrupt
from .outputs import OutputPath

Self = TypeVar("Self", bound="RunDisplay")

_OPTIONS = (
    click.option("--preset", type=click.Choice(preset_names()), help="Whose model to use."),
    click.option("--model", metavar="PATH|REPO", help="The model.  [default: tiny's]"),
    click.option(
        "--data",
        required=True,
        metavar="FILE|NAME",
        help="A .txt, .jsonl or .jsonl.gz file, or a dataset on the hub.",
    ),
    click.option(
        "--out",
        required=True,
        metavar="DIR",
        type=OutputPath(folder=True),
        help="A new folder to write to.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the run in --out."),
)


def run_options(command: Callable) -> Callable:
    """Add the options of a run: whose model, what is read, where it is written."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class RunDisplay:
    """Show a bar. From the first call of :meth:`show` on, Ctrl-C ends the run after the step, when it
    is saved; a second Ctrl-C ends it at once.

    Args:
        label (str): What stands before the bar.
        first (str): What is done before the first step.
        step (str): What a step is called.
        **options: Of rich's ``Progress``.
    """

    def __init__(self, label: str, first: str, step: str, **options: Any) -> None:
        self._bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            **options,
        )
        self._task = self._bar.add_task(first, total=None)
        self._step = step
        self._interrupt = Interrupt(self._say_that_it_stops)

    def begin(self) -> None:
        """Take Ctrl-C from here on."""
        self._interrupt.__enter__()

    def show(self, done: int, total: int, text: str) -> None:
        """Show how much is done, of how much, and what to say of it."""
        self._bar.update(self._task, completed=done, total=total, description=text)

    def stop_if_asked(self, done: int, total: int) -> None:
        """Raise ``KeyboardInterrupt`` where Ctrl-C was pressed and something is left to do."""
        if self._interrupt() and done < total:
            raise KeyboardInterrupt

    def __enter__(self: Self) -> Self:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._interrupt.__exit__()
        if self._bar.console.is_terminal:
            self._bar.stop()

    def _say_that_it_stops(self) -> None:
        self._bar.console.print(f"Stopping after this {self._step}. Ctrl-C again stops at once.")
