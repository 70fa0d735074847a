"""mlx-dsa eval leaderboard: every rule against every other."""

from __future__ import annotations

from pathlib import Path

import click

from ...evals.leaders import leaderboard as run_leaderboard
from ...evals.suite import read_suite, select_runs
from ...presets import load_settings, resource
from ..command import Command
from ..options import model_options
from ..session import hint_at_blas
from .options import open_world
from .show import progress_bar
from .suite import folder_options, suite_folder, suite_settings


@click.command(cls=Command)
@click.argument("file", metavar="[FILE]", required=False)
@click.option(
    "--rules",
    metavar="NAME,...",
    callback=lambda context, option, value: list(filter(None, value.split(","))) if value else [],
    help="These rules of selecting and of forgetting only.  [default: all]",
)
@click.option(
    "--run",
    "only",
    multiple=True,
    metavar="NAME",
    help="Make this run only; may be repeated. Tables show the others that are there.",
)
@folder_options
@model_options
def leaderboard(
    file: str | None,
    rules: list[str],
    only: tuple[str, ...],
    quick: bool,
    out: str | None,
    preset: str | None,
    model: str | None,
    indexer: str | None,
    config: str | None,
) -> None:
    """Every rule on the same questions and texts: tables and pictures by budget.

    FILE is a suite with boards; without it, the bundled model's. What is there already is not
    made again: an interrupted leaderboard goes on. A rule or run that fails is told, and the
    others are made.
    """
    source = Path(file) if file else resource("eval/leaderboard.json")
    plan = read_suite(source)
    if not plan.get("boards"):
        raise click.UsageError(f"{source} has no boards. Use mlx-dsa eval suite.")
    select_runs(plan, only)
    settings, called = suite_settings(plan, preset, model, indexer, config)
    folder = suite_folder(plan, source, out, quick)
    world = open_world()
    hint_at_blas()
    subject = load_settings(settings)
    with progress_bar(world) as progress:
        _, failed = run_leaderboard(
            subject,
            plan,
            folder,
            rules=rules,
            only=only,
            quick=quick,
            name=called,
            world=world,
            progress=progress,
            note=lambda text: click.echo(text, err=True),
        )
    if world.rank == 0 and (folder / "leaderboard.md").exists():
        click.echo(f"Wrote {folder / 'leaderboard.md'}")
    if failed:
        run, error = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of the runs failed, the first of them {run}: {error}")
