"""Sinks, a window, and keys at distances that are powers of two: nothing is scored.

Chen et al., PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse
Attention, 2025: with d layers of it a token hears of 2^d tokens, where a window's reach grows by
its width a layer. Deviations: the window is no number of its own, but what sinks and powers leave
of ``top_k``; the model stays as it is; distances are those of keys, and with ``block`` those of
blocks, which are read whole, as kernels do. A tile of queries counts in blocks of at least
``tile_size``, so that its queries share what they read. Where there is no room for all powers, the
nearer are read. In a budget, distances are those of the text, and what stands at one may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .rule import at_least
from .select_rule import SelectRule

# Less than what is forced, more than any position.
_POWER = float(mx.finfo(mx.float32).max)


@register("select", "power")
@dataclass(frozen=True)
class Power(SelectRule):
    """Read the sinks, the newest keys, and those at distances of 1, 2, 4, 8 and so on.

    Args:
        block (int): Keys a block: distances are counted in these, and blocks are read
          whole. Default: ``1``.
    """

    block: int = 1

    def __post_init__(self):
        at_least("select", "power", block=(self.block, 1))

    def scores(self, probe, cache, n_visible, end):
        B, _, L, _ = probe.queries.shape
        positions = mx.broadcast_to(cache.positions[:, :end], (B, end))
        newest = mx.take(positions, n_visible.astype(mx.int32) - 1, axis=1)[..., None]
        distance = newest // self.block - positions[:, None] // self.block
        # A power of two has one bit.
        is_power = (distance > 0) & ((distance & (distance - 1)) == 0)
        return mx.where(is_power, _POWER, positions[:, None].astype(mx.float32))

    def tile_scores(self, probe, cache, tile_size, end, first):
        by_block = Power(max(self.block, tile_size))
        return super(Power, by_block).tile_scores(probe, cache, tile_size, end, first)
