"""mlx-dsa eval code: what is found in long Python source?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.code_recall import code as run_code
from ...tasks.code_items import FORMS, SETTINGS, TASKS
from ...tasks.facts import VALUES
from ..command import Command
from ..options import max_tokens_option
from .options import Numbers, eval_options
from .show import run_and_show


@click.command(cls=Command)
@click.option(
    "--lengths",
    type=Numbers(),
    metavar="N,...",
    help="Tokens of the code with its question.  [default: 2048,4096]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Texts for each length and depth.  [default: 4]")
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default="constants",
    show_default=True,
    help="What is asked for: constants planted among the code, its own definitions, or its functions.",
)
@click.option(
    "--setting",
    type=click.Choice(SETTINGS),
    default="before-question",
    show_default=True,
    help="When the question comes.",
)
@click.option(
    "--value",
    type=click.Choice(VALUES),
    default="mixed",
    show_default=True,
    help="Of planted constants.",
)
@click.option(
    "--phrasing",
    type=click.Choice(list(FORMS)),
    default="train",
    show_default=True,
    help="Forms of constants and wordings of questions: those that training has too, or others.",
)
@click.option(
    "--per-document",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Questions about each text, which is read once.",
)
@click.option(
    "--stem",
    is_flag=True,
    help="Begin each reply with the answer up to its value, or a function up to its name.",
)
@max_tokens_option(48)
@eval_options()
def code(lengths: list[int] | None, limit: int | None, quick: bool, **given: Any) -> None:
    """Ask about files of Python's standard library, a quarter of which no recipe trains on.

    The code is that of the Python that runs this: results name its version.
    """
    run_and_show(
        run_code,
        lengths=lengths or ([1024] if quick else [2048, 4096]),
        depths=[0.25, 0.75] if quick else [0.1, 0.3, 0.5, 0.7, 0.9],
        limit=limit or (1 if quick else 4),
        **given,
    )
