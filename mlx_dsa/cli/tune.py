"""mlx-dsa tune: find where sparse attention begins to win, on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console

from ..bench import tune as run_tune
from ..crossovers import CROSSING, Measured, crossover_file, describe, forget, resolve_auto
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
@click.option(
    "--reset",
    is_flag=True,
    help="Forget what was measured for this model and these settings; measure nothing.",
)
@click.option("--all", "everything", is_flag=True, help="With --reset: forget all that was measured.")
@subject_options
def tune(chunk: int, seconds: float, reset: bool, everything: bool, **given: Any) -> None:
    """Measure from which length on sparse attention is faster than dense, and store it.

    --prefill auto then follows it for the same model shape, settings, device and
    versions, unless it is stream: with --positions compact and retention heads.
    """
    if everything and not reset:
        raise click.UsageError("--all needs --reset.")
    if reset:
        _reset(everything, given)
        return
    check_output(crossover_file())
    subject = open_subject(**given)
    console = Console(stderr=True)
    with console.status("Measuring"):
        model, indexers = subject.load()
        result = run_tune(
            model,
            indexers,
            subject.config,
            chunk=chunk,
            seconds=seconds,
            report=lambda row: console.print(f"{row['keys']:,} keys measured", highlight=False),
        )
    rows = result["rows"]
    if rows:
        _print_rows(rows)
    lengths = [row["keys"] for row in rows]
    for line in describe_crossovers(result["crossovers"], lengths, result["left_out"]):
        click.echo(line)
    if resolve_auto(subject.config, indexers) != subject.config:
        click.echo("Note: with these settings prefill auto is stream, at every length.", err=True)
    if result["file"]:
        click.echo(f"Wrote {result['file']}")
    else:
        click.echo("Nothing is stored: give --seconds more.")


def _reset(everything: bool, given: dict[str, Any]) -> None:
    if everything:
        named = [name for name, value in given.items() if value is not None]
        if named:
            option = named[0].removesuffix("_file").replace("_", "-")
            raise click.UsageError(f"--all is of every model: leave --{option} out.")
        found = forget()
    else:
        subject = open_subject(**given)
        found = forget(describe(*subject.load(), subject.config))
    what = "All measurements are" if everything else "What was measured for this model is"
    click.echo(f"{what} forgotten ({crossover_file()})." if found else "Nothing was stored.")


def _print_rows(rows: list[dict[str, float]]) -> None:
    names = [name for name in rows[0] if name != "keys"]
    cells = [[f"{row['keys']:,}", *(f"{row[name]:.3f}" for name in names)] for row in rows]
    titles = (name.replace("_", " ") for name in names)
    print_table(["keys", *(f"{title} ms" for title in titles)], cells)
    click.echo()


def describe_crossovers(
    crossovers: Mapping[str, int | None],
    lengths: Sequence[int],
    left_out: Mapping[str, str] = {},
) -> list[str]:
    """Return what was measured as lines of text.

    Args:
        crossovers (Mapping): ``tile``, ``exact`` and ``decode``, where they were
          measured, to keys, or ``None``.
        lengths (sequence of int): Keys at which they were compared, ascending.
        left_out (Mapping): Those that are not stored, and why. Default: ``{}``.
    """
    names = {"tile": "prefill by tile", "exact": "exact prefill", "decode": "decode"}
    lines = []
    for way in CROSSING:
        if way in left_out:
            found = f"not known: {left_out[way]}"
        elif way in crossovers:
            found = _describe(crossovers[way], lengths)
        else:
            found = "not measured"
        lines.append(f"{names[way]}: {found}")
    return lines


def _describe(start: int | None, lengths: Sequence[int]) -> str:
    if start is None:
        limit = f" up to {lengths[-1]:,} keys" if lengths else ""
        return f"not faster than dense{limit}"
    if lengths and start == lengths[0]:
        return f"faster than dense from the shortest measured, {start:,} keys"
    return f"faster than dense from {start:,} keys"


def describe_measured(found: Measured) -> str:
    """Return when a measurement was made, and from what."""
    dtype, bits = found.of.get("dtype"), found.of.get("bits")
    weights = f"{bits}-bit weights" if bits else "weights as they are"
    lengths = found.lengths
    spread = f" at {len(lengths)} lengths from {lengths[0]:,} to {lengths[-1]:,} keys"
    return f"measured {found.when}, {dtype} and {weights}{spread if lengths else ''}"
