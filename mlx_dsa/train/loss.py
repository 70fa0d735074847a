"""What an indexer learns, and how well it has learnt it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..indexer import Indexer
from .config import LayerScore, TrainConfig
from .teacher import visible_keys

_UNSEEN = -1e30  # finite: a target of 0 times -inf would be NaN


def row_scores(indexer: Indexer, x: mx.array, rows: mx.array) -> mx.array:
    """Compute the index scores of sampled query rows over all keys.

    Args:
        indexer (Indexer): The indexer, in float32.
        x (mx.array): Normalised hidden state ``[B, L, dim]``.
        rows (mx.array): Query positions ``[B, R]``.

    Returns:
        mx.array: Scores ``[B, R, L]``, float32; ``-1e30`` for unseen keys.
    """
    B, R = rows.shape
    keys = indexer.project_keys(x)
    # Each sampled row is a sequence of its own that begins at its position.
    sampled = mx.take_along_axis(x, rows[..., None], axis=1).reshape(B * R, 1, -1)
    queries, weights = indexer.project_queries(sampled, rows.reshape(-1))
    queries = queries.reshape(B, R, queries.shape[1], -1).swapaxes(1, 2)
    weights = weights.reshape(B, R, -1)
    scores = mx.maximum(queries @ keys.swapaxes(-1, -2), 0)
    scores = (scores * weights.swapaxes(-1, -2)[..., None]).sum(axis=1)
    return mx.where(visible_keys(rows, x.shape[1]), scores, _UNSEEN)


def open_keys(rows: mx.array, length: int, config: TrainConfig) -> mx.array:
    """Tell which keys a query has to choose among.

    Args:
        rows (mx.array): Query positions ``[B, R]``.
        length (int): Number of keys.
        config (TrainConfig): Its ``n_sink`` and ``n_recent`` are always selected.

    Returns:
        mx.array: Mask ``[B, R, length]``, bool: seen, and not selected anyway.
    """
    keys = mx.arange(length)
    return (keys >= config.n_sink) & (keys <= rows[..., None] - config.n_recent)


def distillation_loss(scores: mx.array, target: mx.array, is_open: mx.array, config: Any) -> mx.array:
    """Compute ``KL(target || softmax(scores))`` over the open keys.

    Each row counts by the attention that its open keys get: that makes this
    exactly their part of the divergence over all visible keys. The support loss
    joins where ``config.support_weight`` is above 0.

    Args:
        scores (mx.array): Index scores ``[B, R, L]``.
        target (mx.array): Teacher's probabilities ``[B, R, L]``.
        is_open (mx.array): Mask ``[B, R, L]`` of :func:`open_keys`.
        config (TrainConfig): The run.

    Returns:
        mx.array: Mean over rows, a scalar in nats.
    """
    scores = mx.where(is_open, scores, _UNSEEN)
    target = mx.where(is_open, target, 0)
    mass = target.sum(axis=-1)
    total = mx.logsumexp(scores, axis=-1)
    # sum of t * log(t / mass) - t * (scores - total), with one [B, R, L] product less.
    loss = _x_log_x(target).sum(axis=-1) - _x_log_x(mass)
    loss = loss + mass * total - (target * scores).sum(axis=-1)
    if config.support_weight:
        free = config.top_k - config.n_sink - config.n_recent
        threshold = mx.topk(target, free, axis=-1).min(axis=-1, keepdims=True)
        support = mx.where(target >= threshold, scores, _UNSEEN)
        loss = loss + config.support_weight * (total - mx.logsumexp(support, axis=-1))
    return loss.mean()


def layer_score(scores: mx.array, target: mx.array, is_open: mx.array, config: TrainConfig) -> LayerScore:
    """Measure loss, recall@K and mass@K of an indexer's scores.

    Args:
        scores (mx.array): Index scores ``[B, R, L]``, masked; every row sees
          more than ``config.top_k`` keys.
        target (mx.array): Teacher's probabilities ``[B, R, L]``.
        is_open (mx.array): Mask ``[B, R, L]`` of :func:`open_keys`.
        config (TrainConfig): The run.

    Returns:
        LayerScore: Means over rows, as Python floats.
    """
    top_k, seen = config.top_k, scores > _UNSEEN
    ranked = mx.where(seen & ~is_open, -_UNSEEN, scores)
    chosen = mx.argpartition(-ranked, top_k - 1, axis=-1)[..., :top_k]
    best = mx.argpartition(-target, top_k - 1, axis=-1)[..., :top_k]
    in_best = mx.put_along_axis(mx.zeros_like(target), best, mx.array(1.0), axis=-1)
    values = [
        distillation_loss(scores, target, is_open, config),
        mx.take_along_axis(in_best, chosen, axis=-1).mean(),
        mx.take_along_axis(target, chosen, axis=-1).sum(axis=-1).mean(),
        mx.take_along_axis(target, best, axis=-1).sum(axis=-1).mean(),
    ]
    numbers: Any = mx.stack(values).tolist()  # of its forms, a list of numbers
    return LayerScore(*numbers)


def _x_log_x(x: mx.array) -> mx.array:
    return x * mx.log(mx.maximum(x, 1e-30))
