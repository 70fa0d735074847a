"""mlx-dsa eval gsm8k: word problems with worked answers."""

from __future__ import annotations

from typing import Any

import click

from ...evals.word_problems import ProblemOptions
from ...evals.word_problems import gsm8k as run_gsm8k
from ..command import Command
from .declared import chosen, declared_options
from .options import eval_options
from .show import run_and_show


@click.command(cls=Command)
@declared_options(ProblemOptions)
@eval_options()
def gsm8k(quick: bool, **given: Any) -> None:
    """Solve word problems in GSM8K's format; the strict and the flexible reading of the answers.

    The problems are bundled ones. For GSM8K's own: --data gsm8k.
    """
    run_and_show(run_gsm8k, **chosen(ProblemOptions, quick, given))
