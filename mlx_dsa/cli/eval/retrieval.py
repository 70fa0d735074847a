"""mlx-dsa eval retrieval: are the right keys selected?"""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from ...evals.key_retrieval import retrieval as run_retrieval
from ...rules import rule_names
from ..command import Command
from .options import Listing, eval_options, open_run, split_rules
from .show import progress_bar, show


@click.command(cls=Command)
@click.option(
    "--lengths",
    "length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of a text.  [default: 4096]",
)
@click.option(
    "--queries",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Positions a text that are looked at.",
)
@click.option("--data", metavar="FILE|NAME", help="The texts.  [default: bundled books]")
@click.option("--limit", type=click.IntRange(min=1), help="Texts.  [default: 4]")
@click.option(
    "--select",
    metavar="NAME,...",
    callback=lambda context, option, value: split_rules(value) if value else [],
    cls=Listing,
    names=partial(rule_names, "select"),
    help="Rules of selecting to measure too: {}; or '*', each.",
)
@eval_options(policies=False)
def retrieval(
    length: int | None,
    limit: int | None,
    top_k: list[int] | None,
    batch_size: int,
    quick: bool,
    plot: str | None,
    **given: Any,
) -> None:
    """Recall and mass of the indexer's keys against the true attention.

    Beside it: random keys, the newest keys, and the true attention's own best.
    """
    if batch_size != 1:
        raise click.UsageError("retrieval reads one text at a time: leave --batch out.")
    run = open_run(top_k=None, policies=["dense"], **given)
    with progress_bar(run.given["world"]) as progress:
        result = run_retrieval(
            run.subject,
            top_k=top_k or ([64, 128, 256] if quick else [64, 128, 256, 512]),
            length=length or (1024 if quick else 4096),
            limit=limit or (1 if quick else 4),
            progress=progress,
            **run.given,
        )
    show(result, world=run.given["world"], out=given["out"], plot=plot)
