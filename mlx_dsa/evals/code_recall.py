"""Long Python source: are constants found, definitions looked up, functions written as they stand?"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from ..presets import Preset
from ..tasks.code_items import CodeSpec, make_code_items
from ..tasks.needle_items import fields_of
from ..tasks.options import answer_tokens, option, part_of
from ..tasks.source import read_source
from .asking import ask
from .evaluator import Evaluator, Progress, Result, register, takes
from .needles import ASKING, Grid
from .policies import Policy
from .running.runner import World
from .subject import check_lengths, fingerprint


@dataclass(frozen=True, kw_only=True)
class CodeOptions(CodeSpec, Grid):
    """The options of `code`: those of the cases, and the grid of lengths and depths."""

    lengths: Sequence[int] = option(
        help="Tokens of the code with its question.", usual=(2048, 4096), quick=(1024,), metavar="N,..."
    )
    depths: Sequence[float] = option((0.1, 0.3, 0.5, 0.7, 0.9), quick=(0.25, 0.75))
    max_tokens: int = answer_tokens(48)


@takes(CodeOptions)
def code(
    subject: Preset,
    policies: Sequence[Policy],
    options: CodeOptions,
    *,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Ask about files of Python's standard library, under every policy on the very same cases.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        options: each field of `CodeOptions` is an argument.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result, whose rows are as those of `needle`. The code is that of the running
        Python: the result has its version and a hash of it.
    """
    check_lengths("code", subject, options.lengths, policies=policies, written=options.max_tokens)
    source = read_source()
    items = make_code_items(options, source, subject.tokenizer, options.lengths, options.depths, options.limit)
    about = {
        **fields_of(part_of(options, CodeSpec)),
        "lengths": list(options.lengths),
        "depths": list(options.depths),
        "limit": options.limit,
        "python": platform.python_version(),
        "source": fingerprint(source.lines),
    }
    return ask(
        "code",
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


register(Evaluator("code", code, **ASKING))
