"""Keys in the order of their importance, until a block of them adds too little.

Zhang et al., S2O: Early Stopping for Sparse Attention via Online Permutation, 2026 (ACL 2026,
arXiv 2602.22575; read of it were the abstract and summaries of the method, not its kernels).
Queries first read their own segment, then earlier keys in blocks, those of the highest product with
the segment's mean query first, until a block's share of the softmax, counted against what has been
read, falls below a threshold; that block is still read.
Deviations: a segment is a tile in prefill ``"tile"`` and a query alone in ``"exact"`` and in decode,
which the paper leaves dense; sinks and the newest keys (``n_sink``, ``n_recent``) are read first, too;
``top_k`` is the most. The gain that is compared is the mean over a segment's queries and the
heads, so that a segment has one set, one a layer, or with ``by_head`` one a key head (the paper has heads
of their own, and stops by what its kernel has at hand); keys are ordered by the sum over these
heads. Queries are not permuted: that is for the kernel's blocks, and without one changes nothing
that is read. All keys are scored for it: what is selected is shown, not the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..ops.reference import order_keys
from ..registry import register
from ..selection import forced_slots
from .rule import at_least
from .select_rule import SelectRule

# Numbers of a block of products: segments are read some at a time.
_BLOCK = 1 << 24


@register("select", "s2o")
@dataclass(frozen=True)
class S2O(SelectRule):
    """Read keys by importance, a block at a time, until a block adds less than a share.

    Args:
        tau (float): Of what has been read, in the softmax. Default: ``0.01``.
        block (int): Keys read at once. Default: ``64``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    tau: float = 0.01
    block: int = 64
    by_head: bool = False
    fills = False

    def __post_init__(self):
        at_least("select", "s2o", block=(self.block, 1))
        if not 0 <= self.tau < 1:
            raise ValueError(
                f"[SparseConfig] 'select' 's2o': option 'tau' must be at least 0 and below 1 but got {self.tau}."
            )

    def select(self, probe, cache, top_k, n_visible, end, forced):
        queries, keys = probe.queries, cache.keys[:, :, :end]
        B, _, L, D = queries.shape
        if not self.by_head:
            return self._read(queries[:, :, :, None], keys, top_k, n_visible, n_visible, forced)
        n_kv_heads = keys.shape[1]
        queries = queries.reshape(B * n_kv_heads, -1, L, 1, D)
        keys = keys.reshape(B * n_kv_heads, 1, end, D)
        slots = self._read(queries, keys, top_k, n_visible, n_visible, forced)
        return slots.reshape(B, n_kv_heads, L, top_k)

    def select_tiles(self, probe, cache, top_k, tile_size, end, forced):
        B, n_heads, L, D = probe.queries.shape
        queries = probe.queries.reshape(B, n_heads, L // tile_size, tile_size, D)
        before = mx.arange(end - L, end, tile_size)
        return self._read(queries, cache.keys[:, :, :end], top_k, before, before + 1, forced)

    def _read(self, queries, keys, top_k, n_before, n_first, forced) -> mx.array:
        """Read for segments of queries ``[B, Hq, R, S, D]``; return the slots ``[B, R, top_k]``.

        Args:
            n_before (mx.array): Entries that are selected of ``[R]``.
            n_first (mx.array): Entries that the first query of a segment sees ``[R]``.
        """
        B, n_heads, n_rows, size, _ = queries.shape
        rows = max(1, _BLOCK // (B * n_heads * size * keys.shape[2]))
        parts = []
        for i in range(0, n_rows, rows):
            part = slice(i, i + rows)
            parts.append(self._read_rows(queries[:, :, part], keys, top_k, n_before[part], n_first[part], forced))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _read_rows(self, queries, keys, top_k, n_before, n_first, forced) -> mx.array:
        B, n_heads, n_rows, size, D = queries.shape
        n_kv_heads, T = keys.shape[1:3]
        grouped = queries.astype(mx.float32).reshape(B, n_kv_heads, -1, n_rows * size, D)
        products = grouped @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
        products = products.reshape(B, n_heads, n_rows, size, T)

        slots, first = mx.arange(T, dtype=mx.int32), n_first[:, None, None]
        earlier = slots < n_before[:, None]
        fixed = (slots < forced[0]) | (slots >= n_before[:, None] - forced[1])  # and a tile's own
        seen = slots < first + mx.arange(size)[:, None]  # [R, S, T]
        products = mx.where(seen, products, -mx.inf)
        shares = mx.exp((products - products.max(axis=-1, keepdims=True)) * self.layer.scale)
        read = mx.where(fixed[:, None], shares, 0).sum(axis=-1, keepdims=True)

        # By the mean query's product, and of equal ones the newer first.
        worth = mx.where(earlier & ~fixed, products.mean(axis=3).sum(axis=1), -mx.inf)
        order = mx.argsort(order_keys(worth, slots), axis=-1)[..., ::-1][..., :top_k].astype(mx.int32)
        room = top_k - (fixed & earlier).sum(axis=-1)
        usable = mx.take_along_axis(worth, order, axis=-1) > -mx.inf
        usable &= mx.arange(order.shape[-1]) < room[:, None]
        places = mx.broadcast_to(order[:, None, :, None], (B, n_heads, n_rows, size, order.shape[-1]))
        shares = mx.where(usable[:, None, :, None], mx.take_along_axis(shares, places, axis=-1), 0)
        wanted = usable & self._wanted(shares, read)
        always = forced_slots(n_before, T, *forced)
        always = mx.broadcast_to(always, (B, *always.shape))
        chosen = mx.sort(mx.concatenate([always, mx.where(wanted, order, -1)], axis=-1), axis=-1)
        missing = max(0, top_k - chosen.shape[-1])
        return mx.pad(chosen[..., -top_k:], [(0, 0), (0, 0), (missing, 0)], constant_values=-1)

    def _wanted(self, shares, read) -> mx.array:
        """Return which of the shares ``[B, Hq, R, S, n]``, in their order, are read after what
        has been ``[B, Hq, R, S, 1]``: ``[B, R, n]``."""
        n = shares.shape[-1]
        shares = mx.pad(shares, [(0, 0)] * 4 + [(0, -n % self.block)])
        added = shares.reshape(*shares.shape[:-1], -1, self.block).sum(axis=-1)
        before = read + mx.cumsum(added, axis=-1, inclusive=False)
        gains = (added / before).mean(axis=(1, 3))  # [B, R, blocks]
        n_small = mx.cumsum((gains < self.tau).astype(mx.int32), axis=-1, inclusive=False)
        return mx.repeat(n_small == 0, self.block, axis=-1)[..., :n]
