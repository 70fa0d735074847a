"""mlx-dsa eval gsm8k: word problems with worked answers."""

from __future__ import annotations

from typing import Any

import click

from ...evals.word_problems import PROMPTS
from ...evals.word_problems import gsm8k as run_gsm8k
from ..command import Command
from ..options import max_tokens_option
from .options import eval_options
from .show import run_and_show


@click.command(cls=Command)
@click.option(
    "--prompt",
    type=click.Choice(PROMPTS),
    default="chat",
    show_default=True,
    help="Examples as turns of a chat, or as plain text.",
)
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Worked examples before the problem.",
)
@click.option(
    "--many-shot",
    type=click.IntRange(min=0),
    default=0,
    help="So many instead, so that prompts are longer than the budget.",
)
@click.option(
    "--data",
    metavar="FILE|NAME",
    help="A .jsonl file with question and answer, or gsm8k (the hub's test set).  [default: bundled problems]",
)
@click.option(
    "--examples",
    metavar="FILE|NAME",
    help="Where the worked examples come from.  [default: the rest of the data]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Problems.  [default: 100]")
@max_tokens_option(256)
@eval_options()
def gsm8k(limit: int | None, quick: bool, **given: Any) -> None:
    """Solve word problems in GSM8K's format; the strict and the flexible reading of the answers.

    The problems are bundled ones. For GSM8K's own: --data gsm8k.
    """
    run_and_show(run_gsm8k, limit=limit or (8 if quick else 100), **given)
