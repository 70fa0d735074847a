"""Keys that come near the largest products of sinks and window.

Zhang et al., AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, 2025
(arXiv 2505.23520). A query's anchor is its largest scaled product with the first keys and those
near it; single keys ("stripes") are read by a whole block of queries where the mean query's
product falls short of the mean anchor by at most theta.
Deviations: the block is a tile in prefill ``"tile"`` and a query alone in ``"exact"`` and in
decode, which the paper leaves dense; the paper identifies stripes once for several blocks, here each
block has its own. First and near keys are the settings ``n_sink`` and ``n_recent`` (for a tile those
before it and the tile's own), not blocks of 128. ``top_k`` is the most, the smallest differences
first; the paper has no such bound. Sets are one a layer, of the keys that any head's difference admits,
or with ``by_head`` one a key head, of what any query head of its group admits (the paper has heads
of their own); tiles share them. All keys are scored for it, by each head: what is selected is
shown, not the speed of the paper's kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from ..selection import leave_out, select_topk
from .select_rule import SelectRule

# Numbers of a block of products: queries are compared some at a time.
_BLOCK = 1 << 24


@register("select", "anchor")
@dataclass(frozen=True)
class Anchor(SelectRule):
    """Read the keys whose products fall short of the anchor by little.

    Args:
        theta (float): How much, at most, of products as they stand in the softmax. Default: ``12``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    theta: float = 12.0
    by_head: bool = False
    fills = False

    def __post_init__(self):
        if not 0 <= self.theta < math.inf:
            raise ValueError(
                f"[SparseConfig] 'select' 'anchor': option 'theta' must be a number of at least 0 but got {self.theta}."
            )

    def select(self, probe, cache, top_k, n_visible, end, forced):
        scores = self._differences(probe, cache, n_visible, end, forced, 1)
        scores = scores if self.by_head else scores.max(axis=1, keepdims=True)
        slots = self._near(scores.flatten(0, 1), top_k, n_visible, forced)
        return slots.reshape(*scores.shape[:3], top_k) if self.by_head else slots

    def select_tiles(self, probe, cache, top_k, tile_size, end, forced):
        L = probe.queries.shape[2]
        n_visible = mx.arange(end - L + 1, end + 1)
        scores = self._differences(probe, cache, n_visible, end, forced, tile_size).max(axis=1)
        return self._near(scores, top_k, mx.arange(end - L, end, tile_size), forced)

    def _near(self, scores, top_k, n_visible, forced) -> mx.array:
        """Select the highest of scores ``[B, R, T]``, none below minus theta."""
        n_sink, n_recent = forced
        slots = select_topk(scores, top_k, n_visible, n_sink, n_recent, self.backend)
        here = mx.take_along_axis(scores, mx.maximum(slots, 0), axis=-1)
        return leave_out(slots, here >= -self.theta, n_visible, n_sink, n_recent)

    def _differences(self, probe, cache, n_visible, end, forced, tile_size) -> mx.array:
        """Return by how much products exceed the anchor, on the mean of a tile's queries, the
        largest of a group's heads ``[B, Hkv, L / tile_size, end]``."""
        B, n_heads, L, _ = probe.queries.shape
        keys = cache.keys[:, :, :end]
        group = n_heads // keys.shape[1]
        slots, n_visible = mx.arange(end), n_visible[:, None]
        # The newest keys end with a query alone, or before its tile.
        newest = n_visible if tile_size == 1 else n_visible - 1 - mx.arange(L)[:, None] % tile_size
        near = (slots < forced[0]) | (slots >= newest - forced[1])
        near &= slots < n_visible
        rows = max(1, _BLOCK // (B * group * end * tile_size)) * tile_size
        heads = []
        for h in range(keys.shape[1]):
            asked = probe.queries[:, h * group : (h + 1) * group].astype(mx.float32)
            known = keys[:, h : h + 1].astype(mx.float32).swapaxes(-1, -2)
            parts = []
            for i in range(0, L, rows):
                products = asked[:, :, i : i + rows] @ known
                anchors = mx.where(near[i : i + rows], products, -mx.inf).max(axis=-1, keepdims=True)
                above = ((products - anchors) * self.layer.scale).reshape(B, group, -1, tile_size, end)
                parts.append(above.mean(axis=3).max(axis=1))
            heads.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1))
        return mx.stack(heads, axis=1)
