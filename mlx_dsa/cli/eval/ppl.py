"""mlx-dsa eval ppl: how much worse is a text predicted?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.perplexity import PATHS
from ...evals.perplexity import ppl as run_ppl
from ..command import Command
from .options import eval_options
from .show import run_and_show


@click.command(cls=Command)
@click.option(
    "--lengths",
    "length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of a window.  [default: 4096]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="From one window to the next; only as many of its last tokens are scored.  [default: the window]",
)
@click.option(
    "--path",
    type=click.Choice(PATHS),
    default="prefill",
    show_default=True,
    help="Score while reading, or token by token after it.",
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="With --path decode: tokens fed one by one.  [default: 256]",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --path decode: read only the last N tokens of a window.  [default: all]",
)
@click.option(
    "--alone",
    is_flag=True,
    help="Without the dense model, for texts that are longer than its positions.",
)
@click.option(
    "--data",
    metavar="FILE|NAME",
    help="A .txt or .jsonl file, wikitext2, c4, or a hub data set.  [default: bundled books]",
)
@click.option("--documents", type=click.IntRange(min=1), help="Read no more texts than that.")
@click.option("--limit", type=click.IntRange(min=1), help="Windows in all, spread evenly.  [default: 16]")
@eval_options()
def ppl(
    length: int | None,
    decode_tokens: int | None,
    limit: int | None,
    alone: bool,
    quick: bool,
    **given: Any,
) -> None:
    """Perplexity of the tokens that have more than top-k before them.

    The dense model predicts the very same tokens, and each policy is compared with it.
    """
    run_and_show(
        run_ppl,
        beside_dense=not alone,
        length=length or (1024 if quick else 4096),
        decode_tokens=decode_tokens or (32 if quick else 256),
        limit=limit or (2 if quick else 16),
        **given,
    )
