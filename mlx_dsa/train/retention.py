"""Train retention heads: how much will later queries need a token's entry?"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint import load_indexers, save_indexers
from ..families import family_of
from ..indexer import Indexer, RetentionHead
from .config import TrainProgress, TrainResult
from .data import fingerprint, load_sequences
from .lessons import Lesson, make_lessons, stack_queries
from .loop import TrainRun, of_best, split
from .report import Report
from .retention_config import RetentionConfig, RetentionScore
from .state import CHECKPOINT, TrainState, check_out, hash_parameters, run_identity
from .teacher import LayerView, check_model, future_attention

_FIRST_SCORE = -4.0  # log-odds: few keys are ever needed


def train_retention(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: RetentionConfig,
    *,
    indexers: str | os.PathLike,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train one retention head a layer beside the indexers of a frozen model.

    A head sees a token's own state alone, and learns the largest attention that
    any query well after it pays to it, as log-odds. A cache can then be pruned
    before it is known what will be asked.

    Args:
        model: A model of mlx-lm, of a known family, quantised or not,
          unpatched. It is not changed.
        tokenizer: Its tokenizer, as ``mlx_lm.load`` returns it.
        data (str or PathLike): As for :func:`train_indexers`. Conversations in
          which everything that a document says is asked for teach most.
        out (str or PathLike): The folder for the checkpoint, and at the end for
          ``indexers.safetensors`` with its ``run_config.json``. It must be new
          or empty, unless ``resume`` is set.
        config (RetentionConfig): The run.
        indexers (str or PathLike): The indexers' file or folder. They are copied
          as they are; heads that they have are replaced in the copy. A layer
          without an indexer gets no head.
        resume (bool): Go on from the checkpoint in ``out``, which must be of
          this same run; where there is none yet, begin. Default: ``False``.
        progress (callable, optional): Called with a :class:`TrainProgress`
          after every step; its ``held_out`` holds :class:`RetentionScore`.

    Returns:
        TrainResult: The file, and each layer's best step with its scores.

    Raises:
        ValueError: If the model is of another type or patched, the indexers
          don't fit it, a head would be larger than a fifth of its indexer, the
          data is missing or too short, or ``out`` holds another or a finished
          run.
    """
    out, source = Path(out), Path(indexers)
    check_model(model)
    check_out(out, resume)
    beside = load_indexers(source)
    check_sizes(model, beside, config)
    report = Report()
    sequences = load_sequences(
        data,
        tokenizer,
        config.sequence_length,
        config.shortest,
        config.steps * config.batch_size + config.held_out,
        reason="8 * min_distance",
        report=report,
    )
    identity = {
        **run_identity(model, fingerprint(sequences), config),
        "indexers": hash_parameters(beside),
    }
    state = TrainState(new_heads(beside, config), config, RetentionScore)
    lessons = split(make_lessons(sequences, config), config)
    RetentionRun(model, config, state, *lessons).finish(out, identity, resume, progress)
    return _assemble(model, out, source, beside, config, state)._replace(left_out=str(report))


class _Prepared(NamedTuple):
    """The queries ``[B, Q]`` that count, and which keys ``[B, L]`` are learnt from."""

    queries: np.ndarray
    learnt: mx.array


class RetentionRun(TrainRun):
    """Retention heads learn the largest attention of later queries."""

    def prepare(self, batch: list[Lesson], stream: int, number: int) -> _Prepared:
        """Stack queries and keys."""
        length = max(len(lesson.tokens) for lesson in batch)
        n_keys = mx.array([lesson.n_keys for lesson in batch])[:, None]
        return _Prepared(stack_queries(batch), mx.arange(length) < n_keys)

    def loss(self, module: RetentionHead, view: LayerView, prepared: _Prepared, target: mx.array) -> mx.array:
        """Return the loss of one layer's head."""
        return retention_loss(module(view.x), target, prepared.learnt)

    def score(self, module: RetentionHead, view: LayerView, prepared: _Prepared) -> RetentionScore:
        """Return the held-out score of one layer's head."""
        target = self.target(view, prepared)
        return retention_score(module(view.x), target, prepared.learnt)

    def target(self, view: LayerView, prepared: _Prepared) -> mx.array:
        """Return the largest attention that the keys will get."""
        return future_attention(view, prepared.queries, self.config.min_distance)


def retention_loss(scores: mx.array, target: mx.array, learnt: mx.array) -> mx.array:
    """Compute the mean cross-entropy over the keys that are learnt from.

    The largest attention is a number from 0 to 1 and is taken for the chance that
    the key will be needed. The many keys of which nobody takes note weigh little.

    Args:
        scores (mx.array): Scores of a head ``[B, L]``, log-odds.
        target (mx.array): Largest attention ``[B, L]``.
        learnt (mx.array): Which keys count ``[B, L]``, bool.

    Returns:
        mx.array: A scalar in nats.
    """
    losses = mx.logaddexp(0, scores) - target * scores
    return mx.where(learnt, losses, 0).sum() / learnt.sum()


def retention_score(scores: mx.array, target: mx.array, learnt: mx.array) -> RetentionScore:
    """Measure loss and rank agreement of a head on one sequence.

    Args:
        scores, target, learnt (mx.array): As for :func:`retention_loss`, of one
          row, which learns from its first keys.

    Returns:
        RetentionScore: As Python floats.
    """
    n_keys = int(learnt.sum())
    agreement = []
    for share in (16, 8):
        k = max(1, n_keys // share)
        chosen, best = (np.argpartition(np.array(values[0, :n_keys]), -k)[-k:] for values in (scores, target))
        agreement.append(len(np.intersect1d(chosen, best)) / k)
    return RetentionScore(float(retention_loss(scores, target, learnt)), *agreement)


def new_heads(indexers: Mapping[int, Indexer], config: RetentionConfig) -> dict[int, RetentionHead]:
    """Make a head beside each indexer; the seed alone decides their weights."""
    mx.random.seed(config.seed)
    heads = {}
    for layer, indexer in indexers.items():
        heads[layer] = RetentionHead(indexer.args.dim, config.retention_dim)
        heads[layer].down.bias = mx.array([_FIRST_SCORE])
    return heads


def check_sizes(model: Any, indexers: Mapping[int, Indexer], config: RetentionConfig):
    layers = family_of(model).layers(model)
    width = next(iter(layers.values())).hidden_size
    for layer, indexer in indexers.items():
        dim = indexer.args.dim
        if dim != width or layer not in layers:
            raise ValueError(
                f"[train_retention] 'indexers' must be made for this model "
                f"({len(layers)} layers of width {width}) but has layer {layer} of width {dim}."
            )
        own = sum(p.size for n, p in tree_flatten(indexer.parameters()) if "retention" not in n)
        # dim * hidden + hidden (bias) + hidden + 1 parameters.
        most = (own // 5 - 1) // (dim + 2)
        if config.retention_dim > most:
            raise ValueError(
                f"[train_retention] 'retention_dim' must be at most {most}, a fifth of "
                f"the indexer's parameters, but got {config.retention_dim}."
            )


def _assemble(
    model: Any,
    out: Path,
    source: Path,
    indexers: Mapping[int, Indexer],
    config: RetentionConfig,
    state: TrainState,
) -> TrainResult:
    """Save the indexers with each layer's best head; only then does the checkpoint go."""
    together, layers = {}, family_of(model).layers(model)
    for layer, head in state.best_modules().items():
        indexer = indexers[layer]
        if indexer.args.unweighted:
            head.up.weight = head.up.weight * layers[layer].norm_weight.astype(mx.float32)
        args = replace(indexer.args, retention_dim=config.retention_dim)
        together[layer] = Indexer(args)
        parameters = {**indexer.parameters(), "retention": head.parameters()}
        together[layer].update(parameters)
    retention = {"train": dataclasses.asdict(config), "held_out": of_best(state)}
    metadata = {**_metadata(source), "retention_dim": config.retention_dim}
    path = save_indexers(out, together, {**metadata, "retention": retention})
    (out / CHECKPOINT).unlink()
    return TrainResult(path, dict(state.best_steps), dict(state.best_scores))


def _metadata(source: Path) -> dict:
    """Return what the indexers' run_config.json says."""
    folder = source if source.is_dir() else source.parent
    return json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
