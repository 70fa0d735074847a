"""Pages by a bound of what a query can pay them.

Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024. A page's
bound is the sum over channels of the larger of query times least and query times largest key.
Deviations: the sets are one a layer, by the sum of its query heads' bounds, or with ``by_head``
one a key head, by the sum of its group's (the paper has heads of their own); sinks and the newest
keys are always read; a query's own page, which ends with it, is bounded by what the query sees;
prompts are read so, too, where they are read sparsely (the paper's densely: ``prefill``
``"dense"``), and no layer is left dense but by ``dense_layers``. In tiles sets are shared by the
heads, and the last page may be cut. Bounds are made anew from all keys at each step, which reads
as much as attending to all of them does, and spares their values: it shows what is selected, not
its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from ..selection import select_pages
from .rule import at_least
from .select_rule import SelectRule

# Numbers of a block of the queries' own pages.
_BLOCK = 1 << 24


@register("select", "quest")
@dataclass(frozen=True)
class Quest(SelectRule):
    """Read the pages that bounds are highest for, whole.

    Args:
        page (int): Entries a page. Default: ``16``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    page: int = 16
    by_head: bool = False
    fills = False

    def __post_init__(self):
        at_least("select", "quest", page=(self.page, 1))

    def bounds(self, probe, cache, n_visible, end) -> mx.array:
        """Bound the queries' products with the keys of each page.

        Args:
            probe, cache, n_visible, end: As in :meth:`SelectRule.scores`.

        Returns:
            mx.array: ``[B, Hkv, L, n_pages]`` in float32, the sum over a group's query
            heads; of pages that a query sees nothing of, any number.
        """
        keys = cache.keys[:, :, :end]
        B, n_kv_heads, _, D = keys.shape
        n_whole = end // self.page
        pages = keys[:, :, : n_whole * self.page].reshape(B, n_kv_heads, n_whole, self.page, D)
        least, largest = (f(axis=3).astype(mx.float32) for f in (pages.min, pages.max))
        # A group's bounds have one sum: that of its queries' positive and negative parts.
        up, down = self._parts(probe.queries, n_kv_heads)
        whole = up @ largest.swapaxes(-1, -2) + down @ least.swapaxes(-1, -2)
        own = ((n_visible - 1) // self.page).astype(mx.int32)
        bounds = mx.pad(whole, [(0, 0)] * 3 + [(0, -(-end // self.page) - n_whole)])
        return mx.where(
            mx.arange(bounds.shape[-1]) == own[:, None],
            self._own(up, down, keys, own, n_visible)[..., None],
            bounds,
        )

    def _parts(self, queries, n_kv_heads) -> tuple[mx.array, mx.array]:
        B, n_heads, L, D = queries.shape
        queries = queries.astype(mx.float32).reshape(B, n_kv_heads, n_heads // n_kv_heads, L, D)
        return mx.maximum(queries, 0).sum(axis=2), mx.minimum(queries, 0).sum(axis=2)

    def _own(self, up, down, keys, own, n_visible) -> mx.array:
        """Return the bounds of the pages that queries' keys end ``[B, Hkv, L]``."""
        B, n_kv_heads, end, D = keys.shape
        L = up.shape[2]
        rows = max(1, _BLOCK // (B * n_kv_heads * self.page * D))
        parts = []
        for start in range(0, L, rows):
            part = slice(start, start + rows)
            slots = own[part, None] * self.page + mx.arange(self.page, dtype=mx.int32)
            n = slots.shape[0]
            # What lies beyond is the newest that is seen once more.
            slots = mx.minimum(slots, n_visible[part, None].astype(mx.int32) - 1)
            page = mx.take(keys, slots.flatten(), axis=2).astype(mx.float32)
            page = page.reshape(B, n_kv_heads, n, self.page, D)
            bound = up[:, :, part] * page.max(axis=3) + down[:, :, part] * page.min(axis=3)
            parts.append(bound.sum(axis=-1))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def scores(self, probe, cache, n_visible, end):
        bounds = self.bounds(probe, cache, n_visible, end).sum(axis=1)
        return mx.repeat(bounds, self.page, axis=-1)[..., :end]

    def select(self, probe, cache, top_k, n_visible, end, forced):
        bounds = self.bounds(probe, cache, n_visible, end)
        bounds = bounds if self.by_head else bounds.sum(axis=1)
        return select_pages(bounds, self.page, end, top_k, n_visible, *forced)
