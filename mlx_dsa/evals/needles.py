"""Needles in a haystack: is a fact in a long text still found, by length and depth?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..presets import Preset
from ..tasks.haystack import read_haystack
from ..tasks.needle_items import NeedleSpec, fields_of, make_items
from .asking import ask
from .evaluator import Evaluator, Progress, Result, register
from .policies import Policy
from .report.overview import answers_cell
from .report.plots import plot_needle
from .report.tables import begun_note, needle_table, proportions
from .running.runner import World
from .subject import check_lengths


def needle(
    subject: Preset,
    policies: Sequence[Policy],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    limit: int = 4,
    task: str = "single",
    setting: str = "in-prompt",
    value: str = "digits",
    phrasing: str = "train",
    distractors: int = 3,
    per_document: int = 1,
    turns: int = 1,
    even: bool = False,
    stem: bool = False,
    haystack: str | None = None,
    numbers: bool = False,
    max_tokens: int = 48,
    batch_size: int = 1,
    seed: int = 0,
    compare: str | Sequence[str] = "dense",
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Ask for facts that are hidden in prose, under every policy on the very same cases.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        lengths (list of int): tokens of the whole prompt, as in `make_items`.
        depths (list of float): where the fact stands: 0 the start of the text, 1 its end.
        limit (int): texts for each length and depth. Default: ``4``.
        task, setting, value, phrasing, distractors, per_document, turns, even, stem, seed: as in
            `NeedleSpec`.
        haystack (str): the prose, as `load_documents` takes it. Default: ``None``, bundled books.
        numbers (bool): whether half of the haystack is word problems. Default: ``False``.
        max_tokens (int): tokens an answer may have. Default: ``48``.
        batch_size (int): texts at once. Default: ``1``.
        compare (str or list of str): what is compared with what, as in `pairings`.
            Default: ``"dense"``.
        name (str): what the model was loaded as. Default: ``None``.
        out, world, progress: as in `evaluate`.

    Returns:
        dict: the result; see docs/evaluation.md.
    """
    check_lengths("needle", subject, lengths, policies=policies, written=max_tokens)
    spec = NeedleSpec(task, setting, value, phrasing, distractors, per_document, seed, turns, even, stem)
    prose = read_haystack(haystack, subject.tokenizer, numbers, seed)
    items = make_items(spec, prose, subject.tokenizer, lengths, depths, limit)
    about = {
        **fields_of(spec),
        "lengths": list(lengths),
        "depths": list(depths),
        "limit": limit,
        "haystack": haystack or "bundled books",
        "numbers": numbers,
    }
    return ask(
        "needle",
        subject,
        policies,
        items,
        about,
        max_tokens=max_tokens,
        batch_size=batch_size,
        compare=compare,
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
