"""mlx-dsa eval memory: what does it take?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.cache_memory import memory as run_memory
from ..command import Command
from .options import Numbers, eval_options
from .show import run_and_show


@click.command(cls=Command)
@click.option(
    "--lengths",
    type=Numbers(),
    metavar="N,...",
    help="Tokens of the context.  [default: 1024,2048,4096,8192]",
)
@click.option("--data", metavar="FILE|NAME", help="The text.  [default: bundled books]")
@eval_options()
def memory(
    lengths: list[int] | None,
    data: str | None,
    compare: str,
    seed: int,
    batch_size: int,
    quick: bool,
    **given: Any,
) -> None:
    """The cache's bytes, computed and measured, and the program's, by context."""
    if batch_size != 1 or compare != "dense":
        raise click.UsageError(
            "memory reads one text at a time and compares with dense: leave --batch and --compare out."
        )
    run_and_show(
        run_memory,
        lengths=lengths or ([512, 1024] if quick else [1024, 2048, 4096, 8192]),
        haystack=data,
        **given,
    )
