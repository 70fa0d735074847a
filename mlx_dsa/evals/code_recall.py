"""Long Python source: are constants found, definitions looked up, functions written as they stand?"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from ..presets import Preset
from ..tasks.code_items import CodeSpec, make_code_items
from ..tasks.needle_items import fields_of
from ..tasks.source import read_source
from .asking import ask
from .evaluator import Evaluator, Progress, Result, register
from .needles import ASKING
from .policies import Policy
from .running.runner import World
from .subject import check_lengths, fingerprint


def code(
    subject: Preset,
    policies: Sequence[Policy],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    limit: int = 4,
    task: str = "constants",
    setting: str = "before-question",
    value: str = "mixed",
    phrasing: str = "train",
    per_document: int = 4,
    max_tokens: int = 48,
    batch_size: int = 1,
    seed: int = 0,
    stem: bool = False,
    compare: str | Sequence[str] = "dense",
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Ask about files of Python's standard library, under every policy on the very same cases.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        lengths (list of int): tokens of the code with its question, as in `make_code_items`.
        depths (list of float): where what is asked for stands. Default: from 0.1 to 0.9.
        limit (int): texts for each length and depth. Default: ``4``.
        task, setting, value, phrasing, per_document, seed, stem: as in `CodeSpec`.
        max_tokens, batch_size, compare, name, out, world, progress: as in `needle`.

    Returns:
        dict: the result, whose rows are as those of `needle`. The code is that of the running
        Python: the result has its version and a hash of it.
    """
    check_lengths("code", subject, lengths, policies=policies, written=max_tokens)
    spec = CodeSpec(task, setting, value, phrasing, per_document, seed, stem)
    source = read_source()
    items = make_code_items(spec, source, subject.tokenizer, lengths, depths, limit)
    about = {
        **fields_of(spec),
        "lengths": list(lengths),
        "depths": list(depths),
        "limit": limit,
        "python": platform.python_version(),
        "source": fingerprint(source.lines),
    }
    return ask(
        "code",
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


register(Evaluator("code", code, **ASKING))
