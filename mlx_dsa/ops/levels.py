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
    scores = scores.reshape(B, -1, tile_size, n)
    # How many of the sampled keys each tile sees; made here, not by small operations.
    limits = range(n_open, n_open + L, tile_size)
    seen = [min(max(0, -(-(limit - SAMPLED.start) // _STRIDE)), n) for limit in limits]
    n_seen = mx.array(seen)[:, None]
    if seen[0] < n:  # what is open to the first tile is to all
        is_seen = mx.arange(n) < n_seen
        scores = mx.where(is_seen[:, None], scores, -1e30)
    levels = mx.logsumexp(scores, axis=-1)
    if seen[0] == 0:
        levels = mx.where(n_seen > 0, levels, 0)
    return levels.reshape(B, L)
