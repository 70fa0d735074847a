"""What makes the scores of different queries comparable."""

from __future__ import annotations

import mlx.core as mx

# A level is read off one key in so many: these of all slots.
_STRIDE = 32
SAMPLED = slice(_STRIDE // 2, None, _STRIDE)


def score_levels(scores: mx.array, n_open: mx.array) -> mx.array:
    """Find how high each query scores keys on the whole, from a few of them.

    That is the log of the sum of ``exp(score)`` over every 32nd key: indexers are
    trained as the logits of a softmax, whose normaliser it stands for.

    Args:
        scores (mx.array): Scores of the slots in ``SAMPLED``, ``[B, L, n]`` in
          float32, ``L`` a multiple of the tiles.
        n_open (mx.array): Keys that count for each tile (its first ones)
          ``[n_tiles]``.

    Returns:
        mx.array: ``[B, L]`` in float32; 0 for tiles with none of these keys.
    """
    B, L, n = scores.shape
    if n == 0:
        return mx.zeros((B, L))
    slots = mx.arange(SAMPLED.start, SAMPLED.start + n * _STRIDE, _STRIDE)
    is_open = (slots < n_open[:, None])[:, None]
    scores = scores.reshape(B, n_open.shape[0], -1, n)
    levels = mx.logsumexp(mx.where(is_open, scores, -1e30), axis=-1)
    return mx.where(is_open.any(axis=-1), levels, 0).reshape(B, L)
