"""Needles in a haystack: is a fact in a long text still found, by length and depth?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..presets import Preset
from ..tasks.haystack import read_haystack
from ..tasks.needle_items import NeedleSpec, fields_of, make_items
from ..tasks.options import answer_tokens, option, part_of
from .asking import ask
from .evaluator import Evaluator, Progress, Result, register, takes
from .policies import Policy
from .report.overview import answers_cell
from .report.plots import plot_needle
from .report.tables import begun_note, needle_table, proportions
from .running.runner import World
from .subject import check_lengths


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What questions about long texts have in common.

    Args:
        lengths (list of int): Tokens of the whole prompt, as in `make_items`.
        depths (list of float): Where what is asked for stands: 0 the start of the text, 1 its end.
        limit (int): Texts for each length and depth.
        batch_size (int): Texts at once.
        compare (str or list of str): What is compared with what, as in `pairings`.
    """

    lengths: Sequence[int] = option(
        help="Tokens of the prompt.", usual=(1024, 2048, 4096), quick=(512, 1024), metavar="N,..."
    )
    depths: Sequence[float] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Depths of the fact, evenly from start to end.", quick=(0.0, 1.0), counted=True
    )
    limit: int = option(4, "Texts for each length and depth.", least=1, quick=1)
    batch_size: int = 1
    compare: str | Sequence[str] = "dense"


@dataclass(frozen=True, kw_only=True)
class NeedleOptions(NeedleSpec, Grid):
    """The options of `needle`.

    Args:
        haystack (str, optional): The prose, as `load_documents` takes it.
        numbers (bool): Whether half of the haystack is word problems.
        max_tokens (int): Tokens an answer may have.
    """

    haystack: str | None = option(
        None, "The prose.", told="bundled books", metavar="FILE|NAME", flags=("--haystack", "--data")
    )
    numbers: bool = option(False, "Half of the haystack is word problems, full of digits.")
    max_tokens: int = answer_tokens(48)


@takes(NeedleOptions)
def needle(
    subject: Preset,
    policies: Sequence[Policy],
    options: NeedleOptions,
    *,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Ask for facts that are hidden in prose, under every policy on the very same cases.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        options: each field of `NeedleOptions` is an argument.
        name (str): what the model was loaded as. Default: ``None``.
        out, world, progress: as in `evaluate`.

    Returns:
        dict: the result; see docs/evaluation.md.
    """
    check_lengths("needle", subject, options.lengths, policies=policies, written=options.max_tokens)
    prose = read_haystack(options.haystack, subject.tokenizer, options.numbers, options.seed)
    items = make_items(options, prose, subject.tokenizer, options.lengths, options.depths, options.limit)
    about = {
        **fields_of(part_of(options, NeedleSpec)),
        "lengths": list(options.lengths),
        "depths": list(options.depths),
        "limit": options.limit,
        "haystack": options.haystack or "bundled books",
        "numbers": options.numbers,
    }
    return ask(
        "needle",
        subject,
        policies,
        items,
        about,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        compare=options.compare,
        name=name,
        out=out,
        world=world,
        progress=progress,
    )


ASKING: dict[str, Any] = {
    "table": needle_table,
    "plot": plot_needle,
    "pairs": proportions(["length"]),
    "note": begun_note,
    "metrics": ("correct",),
    "cell": answers_cell,
    "asks": True,
}
register(Evaluator("needle", needle, **ASKING))
