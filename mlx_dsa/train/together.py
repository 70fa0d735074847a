"""Train indexers and retention heads together: the teacher reads each text once for both."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..indexer import Indexer
from .config import LayerScore, RunConfig, TrainConfig, TrainProgress, TrainResult
from .data import Sequence, fingerprint, load_sequences
from .lessons import Lesson, make_lessons
from .loop import IndexerRun, TrainRun, assemble, new_indexers, split
from .report import Report
from .retention import RetentionRun, check_sizes, new_heads
from .retention_config import RetentionConfig, RetentionScore
from .state import TrainState, check_out, run_identity
from .teacher import LayerView, check_model

_HEAD = "retention"  # its name in the parameters of an indexer


class BothScore(NamedTuple):
    """Quality of one layer's indexer and head on the held-out sequences.

    Args:
        loss, recall, mass, best_mass (float): As in :class:`LayerScore`.
        head_loss, agreement_16, agreement_8 (float): As in :class:`RetentionScore`.
    """

    loss: float
    recall: float
    mass: float
    best_mass: float
    head_loss: float
    agreement_16: float
    agreement_8: float

    @property
    def indexer(self) -> LayerScore:
        """The indexer's part."""
        return LayerScore(*self[:4])

    @property
    def head(self) -> RetentionScore:
        """The head's part."""
        return RetentionScore(*self[4:])


def train_together(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: TrainConfig,
    retention: RetentionConfig,
    *,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train an indexer and a retention head a layer in one run.

    Both learn from the same sequences, of which those that are read twice are the
    heads' (``repeat_share``), and the frozen model reads each once for both. They
    share no parameters: each learns as it would alone, has its own gradient norm and
    its own best step.

    Args:
        model, tokenizer, data, out: As for :func:`train_indexers`.
        config (TrainConfig): Of the indexers.
        retention (RetentionConfig): Of the heads; what all runs have in common must
          be equal in both.
        resume (bool): As for :func:`train_indexers`. Default: ``False``.
        progress (callable, optional): Called with a :class:`TrainProgress` after every
          step; its ``held_out`` holds :class:`BothScore`.

    Returns:
        TrainResult: The file, and each layer's best steps, of the indexer and of the
        head, with their scores.

    Raises:
        ValueError: As for :func:`train_indexers` and :func:`train_retention`, or if
          the configs differ in what they share.
    """
    out = Path(out)
    _check_shared(config, retention)
    check_model(model)
    check_out(out, resume)
    modules = new_modules(model, config, retention)
    by_top_k = config.top_k >= retention.shortest
    report = Report()
    sequences = load_sequences(
        data,
        tokenizer,
        config.sequence_length,
        max(config.top_k, retention.shortest),
        config.steps * config.batch_size + config.held_out,
        reason="top_k" if by_top_k else "8 * min_distance",
        report=report,
    )
    identity = run_identity(model, fingerprint(sequences), config)
    identity["retention"] = dataclasses.asdict(retention)
    state = BothState(modules, config, BothScore)
    # A text that is read twice may lose a token: it must still be longer than top_k.
    lessons = [x for x in make_lessons(sequences, retention) if len(x.tokens) > config.top_k]
    run = BothRun(model, config, retention, state, *split(lessons, config))
    run.finish(out, identity, resume, progress)
    own = {"train": dataclasses.asdict(retention), "held_out": _of_best(state, 1)}
    told = {"held_out": _of_best(state, 0), _HEAD: own}
    return assemble(out, model, config, state, told)._replace(left_out=str(report))


def _of_best(state: TrainState, which: int) -> dict[int, dict[str, Any]]:
    """Return the best step and scores of each layer's indexer (0) or head (1)."""
    return {
        layer: {
            "best_step": state.best_steps[layer][which],
            **(score.head if which else score.indexer)._asdict(),
        }
        for layer, score in state.best_scores.items()
    }


class BothState(TrainState):
    """Indexers with their heads; a layer's ``best_steps`` are those of either."""

    def keep_best(self, scores: dict[int, BothScore]):
        """Remember the weights of every indexer and every head whose loss is its lowest."""
        for layer, score in scores.items():
            best: BothScore | None = self.best_scores.get(layer)
            if best is None:
                best, self.best_steps[layer] = score, [self.step, self.step]
                self.best[layer] = self.modules[layer].parameters()
            now, steps = self.modules[layer].parameters(), self.best_steps[layer]
            if score.loss < best.loss:
                self.best[layer] = {**now, _HEAD: self.best[layer][_HEAD]}
                best, steps[0] = BothScore(*score.indexer, *best.head), self.step
            if score.head_loss < best.head_loss:
                self.best[layer] = {**self.best[layer], _HEAD: now[_HEAD]}
                best, steps[1] = BothScore(*best.indexer, *score.head), self.step
            self.best_scores[layer] = best


class BothRun(TrainRun):
    """Indexers learn sampled query rows, their heads the largest later attention.

    Args:
        model: The frozen model.
        config (TrainConfig): Of the indexers.
        retention (RetentionConfig): Of the heads.
        state (BothState): Where the run stands.
        train, held_out (list of Lesson): Each longer than ``config.top_k``.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        retention: RetentionConfig,
        state: TrainState,
        train: list[Lesson],
        held_out: list[Lesson],
    ):
        super().__init__(model, config, state, train, held_out)
        self.indexers = IndexerRun(model, config, state, train, held_out)
        self.heads = RetentionRun(model, retention, state, train, held_out)

    def prepare(self, batch: list[Lesson], stream: int, number: int) -> tuple:
        """Return what indexers and heads need."""
        texts = [Sequence(lesson.tokens, lesson.queries) for lesson in batch]
        rows = self.indexers.prepare(texts, stream, number)
        return rows, self.heads.prepare(batch, stream, number)

    def target(self, view: LayerView, prepared: tuple) -> tuple[mx.array, mx.array]:
        """Return the targets of indexer and head."""
        rows, lessons = prepared
        return self.indexers.target(view, rows), self.heads.target(view, lessons)

    def loss(self, module: Indexer, view: LayerView, prepared: tuple, target: tuple) -> mx.array:
        """Return the sum of both losses."""
        (rows, lessons), (attention, largest) = prepared, target
        loss = self.indexers.loss(module, view, rows, attention)
        return loss + self.heads.loss(module.retention, view, lessons, largest)

    def clip(self, gradient: dict) -> dict:
        """Clip either by its own norm, as where they are trained apart."""
        own = {name: g for name, g in gradient.items() if name != _HEAD}
        return {**super().clip(own), _HEAD: super().clip(gradient[_HEAD])}

    def score(self, module: Indexer, view: LayerView, prepared: tuple) -> BothScore:
        """Return the held-out scores of one layer."""
        rows, lessons = prepared
        return BothScore(
            *self.indexers.score(module, view, rows),
            *self.heads.score(module.retention, view, lessons),
        )


def new_modules(model: Any, config: TrainConfig, retention: RetentionConfig) -> dict[int, nn.Module]:
    """Make indexers with heads, each as it is made where it is trained alone.

    Raises:
        ValueError: If a head would be larger than a fifth of its indexer.
    """
    modules: dict[int, nn.Module] = {}
    indexers = new_indexers(model, config)
    check_sizes(model, indexers, retention)
    heads = new_heads(indexers, retention)
    for layer, indexer in indexers.items():
        modules[layer] = Indexer(replace(indexer.args, retention_dim=retention.retention_dim))
        modules[layer].update({**indexer.parameters(), _HEAD: heads[layer].parameters()})
        modules[layer].eval()
    return modules


def _check_shared(config: TrainConfig, retention: RetentionConfig):
    for field in dataclasses.fields(RunConfig):
        one, other = getattr(config, field.name), getattr(retention, field.name)
        if one != other:
            raise ValueError(
                f"[train_together] {field.name!r} must be the same for indexers and heads but got {one} and {other}."
            )
