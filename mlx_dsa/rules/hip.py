"""A tree search over blocks of keys, coarse to fine.

Lee et al., A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with
Hierarchically Pruned Attention (HiP), 2024 (arXiv 2406.09827v2). The keys are cut into as many
equal nodes as shall be found; each node is halved, a half's centre key stands for it, and the
halves of the highest products go on, until nodes are single keys: O(T log T) for a text.
Deviations: sinks and the newest keys (``n_sink``, ``n_recent``) are always read and stand outside
the search, which fills the rest of ``top_k``; all layers search (the paper keeps the first ones
dense: ``dense_layers``); a block of queries is a tile in prefill ``"tile"``, in which the largest
product of its queries counts, and a query alone elsewhere; nodes end at ``block`` keys, wherever
they lie, not at multiples of it, and so may leave a part of ``top_k`` unread. Sets are one a layer,
by the sum over its heads, or with ``by_head`` one a key head (the paper has heads of their own);
tiles share them. Its masks are not carried from step to step of decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..ops import gather_rows
from ..ops.reference import order_keys
from ..registry import register
from ..selection import forced_slots
from .rule import at_least
from .select_rule import SelectRule

# Numbers of the representatives' keys that are gathered at once.
_BLOCK = 1 << 24


@register("select", "hip")
@dataclass(frozen=True)
class Hip(SelectRule):
    """Read the keys that a search by representatives ends at.

    Args:
        block (int): Keys at which nodes are halved no more. Default: ``1``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    block: int = 1
    by_head: bool = False
    fills = False

    def __post_init__(self):
        at_least("select", "hip", block=(self.block, 1))

    def select(self, probe, cache, top_k, n_visible, end, forced):
        B, _, L, D = probe.queries.shape
        keys = cache.keys[:, :, :end]
        n_kv_heads = keys.shape[1]
        # A group's products have one sum: that of its queries.
        queries = probe.queries.astype(mx.float32).reshape(B, n_kv_heads, -1, L, D).sum(axis=2)
        if not self.by_head:
            return self._search(queries[:, :, :, None], keys, top_k, n_visible, end, forced)
        queries, keys = (x.reshape(B * n_kv_heads, 1, *x.shape[2:]) for x in (queries, keys))
        slots = self._search(queries[:, :, :, None], keys, top_k, n_visible, end, forced)
        return slots.reshape(B, n_kv_heads, L, top_k)

    def select_tiles(self, probe, cache, top_k, tile_size, end, forced):
        B, _, L, D = probe.queries.shape
        keys = cache.keys[:, :, :end]
        queries = probe.queries.astype(mx.float32).reshape(B, keys.shape[1], -1, L, D).sum(axis=2)
        queries = queries.reshape(B, keys.shape[1], L // tile_size, tile_size, D)
        return self._search(queries, keys, top_k, mx.arange(end - L, end, tile_size), end, forced)

    def _search(self, queries, keys, top_k, n_visible, end, forced) -> mx.array:
        """Search for tiles of queries ``[B, H, R, S, D]``; return their slots ``[B, R, top_k]``."""
        B, n_heads, n_rows, _, D = queries.shape
        n_visible = n_visible.astype(mx.int32)
        nodes = max(1, top_k // self.block)
        rows = max(1, _BLOCK // (B * n_heads * 2 * nodes * D))
        parts = [
            self._search_rows(queries[:, :, i : i + rows], keys, top_k, n_visible[i : i + rows], end, forced)
            for i in range(0, n_rows, rows)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _search_rows(self, queries, keys, top_k, n_visible, end, forced) -> mx.array:
        always = forced_slots(n_visible, end, *forced)
        n_nodes = (top_k - always.shape[-1]) // self.block
        found = mx.broadcast_to(always, (queries.shape[0], *always.shape))
        if n_nodes > 0:
            leaves = self._leaves(queries, keys, n_nodes, n_visible, end, forced)
            found = mx.concatenate([found, leaves], axis=-1)
        found = mx.pad(found, [(0, 0), (0, 0), (0, top_k - found.shape[-1])], constant_values=-1)
        return mx.sort(found, axis=-1)

    def _leaves(self, queries, keys, n_nodes, n_visible, end, forced) -> mx.array:
        """Return the slots of the nodes that the search ends at ``[B, R, n_nodes * block]``."""
        B, n_rows = queries.shape[0], queries.shape[2]
        n_free = mx.maximum(n_visible - sum(forced), 0)[:, None]
        # Products of a long text and many nodes have no room in 32 bits.
        edges = mx.arange(n_nodes + 1, dtype=mx.int64) * n_free.astype(mx.int64) // n_nodes
        edges = mx.broadcast_to(forced[0] + edges.astype(mx.int32), (B, n_rows, n_nodes + 1))
        starts, stops = edges[..., :-1], edges[..., 1:]
        longest = -(-max(0, end - sum(forced)) // n_nodes)
        while longest > self.block:
            middles = mx.where(stops - starts > self.block, (starts + stops) // 2, starts)
            starts = mx.concatenate([starts, middles], axis=-1)
            stops = mx.concatenate([middles, stops], axis=-1)
            scores = self._scores(queries, keys, (starts + stops) // 2)
            scores = mx.where(stops > starts, scores, -mx.inf)
            # Of equal ones the newer; of two that are nothing, either.
            order = order_keys(scores, mx.minimum(starts, end))
            best = mx.argpartition(order, n_nodes, axis=-1)[..., n_nodes:]
            starts, stops = (mx.take_along_axis(x, best, axis=-1) for x in (starts, stops))
            longest = -(-longest // 2)
        slots = starts[..., None] + mx.arange(self.block, dtype=mx.int32)
        return mx.where(slots < stops[..., None], slots, -1).flatten(2)

    def _scores(self, queries, keys, slots) -> mx.array:
        """Return the largest of a tile's products with the keys of slots ``[B, R, n]``."""
        B, n_heads, n_rows, _, D = queries.shape
        slots = mx.minimum(slots, keys.shape[2] - 1)  # of an empty node
        near = gather_rows(keys, slots.flatten(1)).reshape(B, n_heads, n_rows, -1, D)
        return (queries @ near.astype(mx.float32).swapaxes(-1, -2)).sum(axis=1).max(axis=2)
