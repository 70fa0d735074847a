"""mlx-dsa eval suite: the runs of a file, and the report that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ...evals.running.runner import Share
from ...evals.suite import read_suite, run_suite, select_runs
from ...presets import Settings, load_settings
from ..command import Command
from ..options import model_options, settings_from, subject_name
from ..outputs import check_output
from ..session import hint_at_blas
from .options import open_world
from .show import progress_bar


def _share(context: click.Context, option: click.Parameter, value: str | None) -> Share | None:
    """Return the part that --share names, counted from 1."""
    if value is None:
        return None
    index, _, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and 0 < int(index) <= int(count)):
        raise click.BadParameter(f"{value!r} is not a part such as 2/4.")
    return Share(int(index) - 1, int(count))


def suite_settings(
    plan: dict[str, Any],
    preset: str | None,
    model: str | None,
    indexer: str | None,
    config: str | None,
) -> tuple[Settings, str]:
    """Return what the options load, or else the suite's preset, and what results call it.

    Args:
        plan (dict): The suite.
        preset, model, indexer, config (str, optional): The options.
    """
    if preset is None and model is None:
        preset = plan.get("preset")
    named: dict[str, Any] = {"model": model, "indexer": indexer, "config": config}
    settings = settings_from(preset=preset, **named)
    if settings.indexer is None and preset is None:
        # A copy of the suite's model in a folder of one's own: its indexers fit it.
        settings = settings_from(preset=plan.get("preset"), **named)
    return settings, subject_name(settings, preset, model, config)


def folder_options(command: Callable) -> Callable:
    """Add the options of what makes the runs of a suite into a folder."""
    quick = click.option("--quick", is_flag=True, help="A few items of each run, to see that it works.")
    out = click.option(
        "--out",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="Where to.  [default: results/NAME beside FILE]",
    )
    return quick(out(command))


def suite_folder(plan: dict[str, Any], file: Path, out: str | None, quick: bool) -> Path:
    """Return where the runs of a suite go: ``--out``, or a folder beside its file."""
    title = plan.get("name", file.stem) + ("-quick" if quick else "")
    folder = Path(out) if out else file.parent / "results" / title
    check_output(folder, folder=True)
    return folder


@click.command(cls=Command)
@click.argument("file", metavar="FILE")
@click.option(
    "--run",
    "only",
    multiple=True,
    metavar="NAME",
    help="Make this run only, and no report; may be repeated. Without it, those that are not made yet.",
)
@click.option(
    "--share",
    metavar="I/N",
    callback=_share,
    help="Make part I of N of each run, for processes side by side; without it, the parts are joined.",
)
@folder_options
@model_options
def suite(
    file: str,
    only: tuple[str, ...],
    share: Share | None,
    quick: bool,
    out: str | None,
    preset: str | None,
    model: str | None,
    indexer: str | None,
    config: str | None,
) -> None:
    """Make the runs that FILE names, and one report of them.

    What is there already is not made again: an interrupted suite goes on.
    """
    plan = read_suite(file)
    select_runs(plan, only)
    settings, called = suite_settings(plan, preset, model, indexer, config)
    folder = suite_folder(plan, Path(file), out, quick)
    world = share or open_world()
    hint_at_blas()
    subject = load_settings(settings)
    with progress_bar(world) as progress:
        run_suite(subject, plan, folder, only=only, quick=quick, name=called, world=world, progress=progress)
    if world.rank == 0:
        click.echo(f"Wrote {folder if only or share else folder / 'report.md'}")
