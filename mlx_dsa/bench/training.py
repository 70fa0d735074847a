"""How fast indexers and retention heads are trained, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..families import family_of, positions_of
from ..train.config import LayerScore, TrainConfig
from ..train.data import Sequence
from ..train.lessons import make_lessons
from ..train.loop import IndexerRun, TrainRun, new_indexers
from ..train.retention import RetentionRun, new_heads
from ..train.retention_config import RetentionConfig, RetentionScore
from ..train.state import TrainState
from ..train.together import BothRun, BothScore, new_modules

TRAINED = ("both", "indexers", "retention")
PARTS = ("teacher", "targets", "learning")
# The sizes that docs/training.md trains.
RECIPE = {
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_rope_dim": 32,
    "retention_dim": 64,
}
_TOKENS = 10_000_000  # whose hours a row tells


def bench_training(
    model: nn.Module,
    contexts: Iterable[int],
    config: TrainConfig,
    retention: RetentionConfig,
    *,
    of: Iterable[str] = TRAINED[:1],
    steps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """Time steps of training on random tokens, after one step that does not count.

    The steps are those of :func:`~mlx_dsa.train.train_together`,
    :func:`~mlx_dsa.train.train_indexers` and :func:`~mlx_dsa.train.train_retention`.
    Heads learn from running text read once, where every query counts: no other row of
    so many tokens takes as long.

    Args:
        model (nn.Module): An unpatched model of mlx-lm.
        contexts (iterable of int): Tokens of a sequence.
        config (TrainConfig): Of the indexers; its ``sequence_length``, ``top_k`` (half
          of a context) and ``steps`` are set here.
        retention (RetentionConfig): Of the retention heads; batch and seed are those
          of the indexers.
        of (iterable of str): What is trained, of ``TRAINED``, in runs of their own.
          Default: ``("both",)``.
        steps (int): Steps that count. Default: ``3``.
        clock (callable): Seconds. Default: ``time.perf_counter``.
        progress (callable): Takes steps done, their number, and what runs.

    Returns:
        iterator of dict: For each context and kind ``context``, ``of``, ``step_s``
        (median seconds a step), ``tokens_s``, ``parts_s`` (medians: the model's own
        pass, the targets, loss and gradients), ``peak_memory_gb`` (1e9 bytes, with
        the model) and ``hours_10m_tokens``.

    Raises:
        ValueError: If a context is too short or too long, or a setting not valid.
    """
    contexts, of = list(contexts), list(of)
    for context in contexts:
        _check_context(context, model, retention)
    done, total = 0, len(contexts) * len(of) * (steps + 1)
    for context in contexts:
        for kind in of:
            run = _make_run(kind, model, context, config, retention, steps + 1)
            times = _Times(run, clock)
            found = []
            for step in range(steps + 1):
                what = f"{context:,} tokens, {kind}" + ("" if step else ": warming up")
                progress(done, total, what)
                found.append(times.of_step())
                if step == 0:
                    mx.clear_cache()
                    mx.reset_peak_memory()
                done += 1
            peak = mx.get_peak_memory() / 1e9
            del run, times
            mx.clear_cache()
            yield _row(context, kind, found[1:], config.batch_size, peak)
    progress(done, total, "")


def _check_context(context: int, model: nn.Module, retention: RetentionConfig):
    least, most = retention.shortest + 1, positions_of(model)
    if context < least:
        raise ValueError(f"[bench] 'contexts' must be at least {least} but got {context}.")
    if most is not None and context > most:
        raise ValueError(f"[bench] 'contexts' must be at most the model's {most:,} positions but got {context}.")


def _make_run(
    kind: str,
    model: nn.Module,
    context: int,
    config: TrainConfig,
    retention: RetentionConfig,
    steps: int,
) -> TrainRun:
    """Make a run of either kind over random tokens, with nothing held out."""
    size = dict(sequence_length=context, steps=steps)
    config = replace(config, **size, top_k=context // 2)
    vocab = family_of(model).args(model).vocab_size
    rng = np.random.default_rng(config.seed)
    nowhere = np.zeros(0, np.int32)
    texts = [Sequence(rng.integers(0, vocab, context, dtype=np.int32), nowhere) for _ in range(config.batch_size)]
    retention = replace(retention, **size, repeat_share=0.0, batch_size=config.batch_size, seed=config.seed)
    lessons = make_lessons(texts, retention)
    if kind == "both":
        state = TrainState(new_modules(model, config, retention), config, BothScore)
        return BothRun(model, config, retention, state, lessons, [])
    indexers = new_indexers(model, config)
    if kind == "indexers":
        return IndexerRun(model, config, TrainState(indexers, config, LayerScore), texts, [])
    state = TrainState(new_heads(indexers, retention), retention, RetentionScore)
    return RetentionRun(model, retention, state, lessons, [])


class _Times:
    """Tell what the parts of a run's steps take."""

    def __init__(self, run: TrainRun, clock: Callable[[], float]):
        watched: Any = run  # of which two methods are replaced
        self._run, self._clock = watched, clock
        self._views, self._target = watched.views, watched.target
        watched.views, watched.target = self._watch_views, self._watch_target
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def of_step(self) -> dict[str, float]:
        """Take a step; return the seconds of each part."""
        self._seconds = seconds = dict.fromkeys(PARTS, 0.0)
        start = self._clock()
        self._run.take_step()
        whole = self._clock() - start
        seconds["learning"] = whole - seconds["teacher"] - seconds["targets"]
        return seconds

    def _watch_views(self, batch: list) -> Iterator:
        views = self._views(batch)
        while True:
            start = self._clock()
            view = next(views, None)
            self._seconds["teacher"] += self._clock() - start
            if view is None:
                return
            yield view

    def _watch_target(self, view: Any, prepared: Any) -> mx.array:
        start = self._clock()
        target = self._target(view, prepared)
        mx.eval(target)
        self._seconds["targets"] += self._clock() - start
        return target


def _row(context: int, kind: str, found: list[dict[str, float]], batch: int, peak: float) -> dict[str, Any]:
    step = median(sum(seconds.values()) for seconds in found)
    tokens_s = batch * context / step
    return {
        "context": context,
        "of": kind,
        "step_s": step,
        "tokens_s": tokens_s,
        "parts_s": {part: median(s[part] for s in found) for part in PARTS},
        "peak_memory_gb": peak,
        "hours_10m_tokens": _TOKENS / tokens_s / 3600,
    }
