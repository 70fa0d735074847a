"""mlx-dsa eval: how good is it, measured so that a sceptic believes it?"""

from __future__ import annotations

import click

from .code import code
from .compare import compare
from .coverage import coverage
from .gsm8k import gsm8k
from .leaderboard import leaderboard
from .memory import memory
from .needle import needle
from .other import Evaluations
from .ppl import ppl
from .retrieval import retrieval
from .suite import suite


@click.group("eval", cls=Evaluations)
def evaluate() -> None:
    """Measure quality and memory, dense and sparse on the same items.

    With --out, a run writes its results as it goes, and the same command goes on
    where it was interrupted. Under mlx.launch the items are shared out over the
    processes.
    """


for _command in (needle, code, ppl, gsm8k, retrieval, memory, suite, leaderboard, coverage, compare):
    evaluate.add_command(_command)
