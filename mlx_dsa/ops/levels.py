"""What makes the scores of different queries comparable."""

from __future__ import annotations

import mlx.core as mx

# A level is read off one key in so many: these of all slots.
_STRIDE = 32
SAMPLED = slice(_STRIDE // 2, None, _STRIDE)


def score_levels(scores: mx.array, tile_size: int, n_open: int) -> mx.array:
    """Find how high each query scores keys on the whole, from a few of them.

    That is the log of the sum of ``exp(score)`` over every 32nd key: indexers are
    trained as the logits of a softmax, whose normaliser it stands for.

    Args:
        scores (mx.array): Scores of the slots in ``SAMPLED``, ``[B, L, n]`` in
          float32, ``L`` a multiple of the tiles.
        tile_size (int): Queries a tile.
        n_open (int): Keys that count for the first tile (its first ones); for each
          next one ``tile_size`` more.

    Returns:
        mx.array: ``[B, L]`` in float32; 0 for tiles with none of these keys.
    """
    B, L, n = scores.shape
    if n == 0:
        return mx.zeros((B, L))
    scores = scores[...]  # the caller's own stays as it is
    limits = n_open + mx.arange(L)[:, None] // tile_size * tile_size
    # What is open to the first tile is to all: only the rest must be looked at.
    n_all = min(max(0, -(-(n_open - SAMPLED.start) // _STRIDE)), n)
    if n_all < n:
        slots = SAMPLED.start + _STRIDE * mx.arange(n_all, n)
        rest = mx.where(slots < limits, scores[..., n_all:], -1e30)
        scores[..., n_all:] = rest
    levels = mx.logsumexp(scores, axis=-1)
    if n_all == 0:
        levels = mx.where(limits[:, 0] > SAMPLED.start, levels, 0)
    return levels
