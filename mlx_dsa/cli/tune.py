"""mlx-dsa tune: find where sparse attention begins to win, on this machine."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from ..bench import tune as run_tune
from ..crossovers import crossover_file
from .command import Command
from .eval.show import print_table
from .options import FiniteRange
from .outputs import check_output
from .subject import chunk_option, open_subject, subject_options


@click.command(cls=Command)
@chunk_option
@click.option(
    "--seconds",
    type=FiniteRange(min=0),
    default=60.0,
    show_default=True,
    help="Begin no measurement that would probably end after this time.",
)
@subject_options
def tune(chunk: int, seconds: float, **given: Any):
    """Measure from which length on sparse attention is faster than dense, and store it.

    --prefill auto then follows it for the same model shape, settings, device and
    versions.
    """
    check_output(crossover_file())
    subject = open_subject(**given)
    console = Console(stderr=True)
    with console.status("Measuring"):
        result = run_tune(
            *subject.load(),
            subject.config,
            chunk=chunk,
            seconds=seconds,
            report=lambda row: console.print(f"{row['keys']:,} keys measured", highlight=False),
        )
    names = [name for name in result["rows"][0] if name != "keys"]
    cells = [
        [f"{row['keys']:,}", *(f"{row[name]:.3f}" for name in names)]
        for row in result["rows"]
    ]
    titles = (name.replace("_", " ") for name in names)
    print_table(["keys", *(f"{title} ms" for title in titles)], cells)
    click.echo()
    for line in describe_crossovers(result["crossovers"], result["longest"]):
        click.echo(line)
    click.echo(f"Wrote {result['file']}")


def describe_crossovers(
    crossovers: dict[str, int | None], longest: int | None = None
) -> list[str]:
    """Return what was measured as lines of text.

    Args:
        crossovers (dict): ``tile``, ``exact`` and ``decode`` to keys, or ``None``.
        longest (int, optional): Keys up to which it was looked for.
    """
    limit = "" if longest is None else f" up to {longest:,} keys"
    names = {"tile": "prefill by tile", "exact": "exact prefill", "decode": "decode"}
    return [
        f"{name}: faster than dense from {crossovers[way]:,} keys"
        if crossovers[way] is not None
        else f"{name}: not faster than dense{limit}"
        for way, name in names.items()
    ]
