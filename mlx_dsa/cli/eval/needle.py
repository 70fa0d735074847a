"""mlx-dsa eval needle: is a fact in a long text still found?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.needles import needle as run_needle
from ...tasks.facts import VALUES
from ...tasks.needle_items import SETTINGS, TASKS
from ...tasks.wordlists import SPLITS
from ..command import Command
from ..options import max_tokens_option
from .options import Numbers, eval_options
from .show import run_and_show


@click.command(cls=Command)
@click.option(
    "--lengths",
    type=Numbers(),
    metavar="N,...",
    help="Tokens of the prompt.  [default: 1024,2048,4096]",
)
@click.option(
    "--depths",
    type=click.IntRange(min=1),
    help="Depths of the fact, evenly from start to end.  [default: 5]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Texts for each length and depth.  [default: 4]")
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default="single",
    show_default=True,
    help="What is hidden and asked.",
)
@click.option(
    "--setting",
    type=click.Choice(SETTINGS),
    default="in-prompt",
    show_default=True,
    help="When the question comes.",
)
@click.option(
    "--value",
    type=click.Choice(VALUES),
    default="digits",
    show_default=True,
    help="What the fact tells.",
)
@click.option(
    "--phrasing",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
    help="Wordings of facts and questions; the bundled model saw those of train.",
)
@click.option(
    "--distractors",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Other facts in the text.",
)
@click.option(
    "--per-document",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Questions about each text, which is read once; not with --setting two-turns.",
)
@click.option(
    "--turns",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Questions one after the other in a conversation, with --setting before-question; the last is judged.",
)
@click.option(
    "--even",
    is_flag=True,
    help="Make the questions of a run equally long, by words of no weight: they are answered at once.",
)
@click.option(
    "--stem",
    is_flag=True,
    help="Begin each reply with the answer up to its value; not with --task multi-query.",
)
@click.option(
    "--haystack",
    "--data",
    "haystack",
    metavar="FILE|NAME",
    help="The prose.  [default: bundled books]",
)
@click.option("--numbers", is_flag=True, help="Half of the haystack is word problems, full of digits.")
@max_tokens_option(48)
@eval_options()
def needle(lengths: list[int] | None, depths: int | None, limit: int | None, quick: bool, **given: Any) -> None:
    """Hide facts in prose and ask for them, by length and depth."""
    depths = depths or (2 if quick else 5)
    run_and_show(
        run_needle,
        lengths=lengths or ([512, 1024] if quick else [1024, 2048, 4096]),
        depths=[i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5],
        limit=limit or (1 if quick else 4),
        **given,
    )
