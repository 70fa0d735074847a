"""mlx-dsa eval code: what is found in long Python source?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.code_recall import CodeOptions
from ...evals.code_recall import code as run_code
from ..command import Command
from .declared import chosen, declared_options
from .options import eval_options
from .show import run_and_show


@click.command(cls=Command)
@declared_options(CodeOptions)
@eval_options()
def code(quick: bool, **given: Any) -> None:
    """Ask about files of Python's standard library, a quarter of which no recipe trains on.

    The code is that of the Python that runs this: results name its version.
    """
    run_and_show(run_code, **chosen(CodeOptions, quick, given))
