"""mlx-dsa eval needle: is a fact in a long text still found?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.needles import NeedleOptions
from ...evals.needles import needle as run_needle
from ..command import Command
from .declared import chosen, declared_options
from .options import eval_options
from .show import run_and_show


@click.command(cls=Command)
@declared_options(NeedleOptions)
@eval_options()
def needle(quick: bool, **given: Any) -> None:
    """Hide facts in prose and ask for them, by length and depth."""
    run_and_show(run_needle, **chosen(NeedleOptions, quick, given))
