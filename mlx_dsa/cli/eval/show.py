"""What an evaluation shows: progress while it runs, then tables and a picture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ...evals.evaluator import Result
from ...evals.report.plots import plot as draw
from ...evals.report.tables import caption, pairs_table, table
from ...evals.running.runner import World
from ..progress import counting_bar
from .options import open_run


def progress_bar(world: World) -> AbstractContextManager[Callable[[int, int, str], None]]:
    """Return the bar of an evaluation, on standard error. The first process shows it."""
    return counting_bar(Console(stderr=True, quiet=world.rank > 0))


def run_and_show(evaluator: Callable[..., Result | None], *, plot: str | None, **given: Any) -> None:
    """Run an evaluator that compares policies, and show its result.

    Args:
        evaluator (callable): Of mlx_dsa.evals.
        plot (str, optional): Where its picture goes.
        given: The arguments of :func:`open_run` and of the evaluator.
    """
    run = open_run(**given)
    with progress_bar(run.given["world"]) as progress:
        result = evaluator(run.subject, run.policies, progress=progress, **run.given)
    show(result, world=run.given["world"], out=given["out"], plot=plot)


def show(result: Result | None, *, world: World, out: str | None = None, plot: str | None = None) -> None:
    """Print a result's tables, draw it if wanted, and say where it is. The first process does.

    ``None``, from a `Share`, is not shown.
    """
    if result is None or world.rank:
        return
    if plot:
        draw(result, plot)
    note = caption(result)
    if note:
        click.echo(note)
    print_table(*table(result))
    pairs = pairs_table(result)
    if pairs:
        click.echo()
        print_table(*pairs)
    click.echo()
    for path in (out, plot):
        if path:
            click.echo(f"Wrote {path}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table to the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    grid = Table(box=None, pad_edge=False)
    for column in header:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
