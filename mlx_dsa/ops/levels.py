"""What makes the scores of different queries comparable."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

# A level is read off one key in so many.
_STRIDE = 32


def score_levels(
    score: Callable,
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    n_open: mx.array,
) -> mx.array:
    """Find how high each query scores keys on the whole, from a few of them.

    That is the log of the sum of ``exp(score)`` over every 32nd key: indexers are
    trained as the logits of a softmax, whose normaliser it stands for.

    Args:
        score (callable): What scores the keys: :func:`reference.index_scores` or its
          kernel.
        queries (mx.array): ``[B, Hi, L, Di]``, ``L`` a multiple of the tiles.
        weights (mx.array): Head weights ``[B, L, Hi]``.
        keys (mx.array): ``[B, 1, T, Di]``.
        n_open (mx.array): Keys that count for each tile (its first ones)
          ``[n_tiles]``.

    Returns:
        mx.array: ``[B, L]`` in float32; 0 for tiles with none of these keys.
    """
    B, _, L, _ = queries.shape
    first = _STRIDE // 2
    if keys.shape[2] <= first:
        return mx.zeros((B, L))
    scores = score(queries, weights, keys[:, :, first::_STRIDE])
    slots = mx.arange(first, keys.shape[2], _STRIDE)
    is_open = (slots < n_open[:, None])[:, None]
    scores = scores.reshape(B, n_open.shape[0], -1, slots.shape[0])
    levels = mx.logsumexp(mx.where(is_open, scores, -1e30), axis=-1)
    return mx.where(is_open.any(axis=-1), levels, 0).reshape(B, L)
