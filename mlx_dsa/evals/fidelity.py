"""How much of the true attention a selection of keys covers."""

from __future__ import annotations

import mlx.core as mx

from ..selection import select_topk


def true_attention(queries: mx.array, keys: mx.array, positions: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    """Return attention logits, masked causally, and their softmax.

    Args:
        queries (mx.array): `[Hq, R, D]`, of some positions.
        keys (mx.array): `[Hkv, T, D]`, of all.
        positions (mx.array): of the queries `[R]`.
        scale (float): factor on the products.

    Returns:
        (mx.array, mx.array): both `[Hq, R, T]` in float32.
    """
    repeats = queries.shape[0] // keys.shape[0]
    keys = mx.repeat(keys.astype(mx.float32), repeats, axis=0)
    logits = queries.astype(mx.float32) @ keys.swapaxes(-1, -2) * scale
    visible = mx.arange(keys.shape[1]) <= positions[:, None]
    logits = mx.where(visible, logits, -mx.inf)
    return logits, mx.softmax(logits, axis=-1)


def top_mask(scores: mx.array, k: int) -> mx.array:
    """Return which entries are among the `k` largest of their row, as a mask of the same shape."""
    best = mx.argpartition(scores, kth=scores.shape[-1] - k, axis=-1)[..., -k:]
    return mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), best, mx.array(True), axis=-1)


def selection_mask(scores: mx.array, k: int, positions: mx.array, n_sink: int = 0, n_recent: int = 0) -> mx.array:
    """Return the keys that a query selects, as the runtime would, as a mask `[R, T]`.

    Args:
        scores (mx.array): of keys for queries `[R, T]`, float32.
        k (int): keys a query.
        positions (mx.array): of the queries `[R]`.
        n_sink, n_recent (int): keys that are always selected. Default: ``0``.
    """
    slots = select_topk(scores[None], k, positions + 1, n_sink, n_recent)[0]
    return slots_mask(slots, scores.shape[1])


def slots_mask(slots: mx.array, width: int) -> mx.array:
    """Return slots `[..., K]`, -1 where there is none, as a mask `[..., width]`."""
    mask = mx.zeros((*slots.shape[:-1], width + 1), mx.bool_)
    at = mx.where(slots < 0, width, slots)
    return mx.put_along_axis(mask, at, mx.array(True), axis=-1)[..., :width]


def coverage(selected: mx.array, logits: mx.array, probabilities: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return recall@K and mass@K of a selection, for each head and query.

    Args:
        selected (mx.array): mask `[R, T]`, or `[Hkv, R, T]` where each key head has a set.
        logits, probabilities (mx.array): of `true_attention`.
        k (int): the K of recall: how many of a head's own top K are selected.

    Returns:
        (mx.array, mx.array): both `[Hq, R]`.
    """
    if selected.ndim == 3:
        selected = mx.repeat(selected, len(logits) // len(selected), axis=0)
    hit = (top_mask(logits, k) & selected).sum(axis=-1) / k
    return hit, mx.where(selected, probabilities, 0).sum(axis=-1)
