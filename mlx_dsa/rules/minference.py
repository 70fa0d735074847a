"""Heads by their pattern: A-shape, vertical-slash, or blocks.

Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention, 2024. Which pattern a head has is found offline (``mlx-dsa calibrate --rule
minference``). A-shape: the first keys and the newest. Vertical-slash: the keys (verticals) and the
distances (slashes) that the last queries pay most. Block-sparse: the blocks of keys whose mean has
the largest products with the mean of the query's block.

Deviations: a pattern is a key head's, and what it is made of the mean over the group's query
heads (the paper has a pattern a query head); each pattern has ``top_k`` keys a query, in place of
kernels that cost the same, and a slash is one distance, where the paper's kernel reads 64 beside
each other; sinks, the newest keys and a query's own block are always read; the last queries are
those of each part that a chunk of the prompt is read in, so what is read depends on the calls
that the prompt is cut into; a query's block is averaged over those of its queries that are in the
part. The offline search compares the attention that is kept, as the published code does (the
paper: the output), on sampled queries, and its candidates are that code's, as shares of ``top_k``.
The paper's decode is dense; here a step, or a call of one token, asks its own query alone: of a
vertical-slash head it reads the best keys.
Where heads share a set (tiles), it is by the sum of the masses above over them, and A-shape heads
ask for nothing more than what is always read.

MLX has no attention with a layout a head, so keys are gathered by query and head: a prompt is read
as ``quest`` with ``by_head`` reads it, which shows what is selected, not the paper's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from ..checkpoint_file import MINFERENCE
from ..ops.reference import order_keys
from ..registry import register
from ..selection import select_pages, select_topk
from .attending import attention_probabilities
from .rule import at_least
from .select_rule import SelectRule

A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)


class Heads(NamedTuple):
    """Some key heads of one pattern, with their queries and keys.

    Args:
        heads (list of int): Which.
        queries (mx.array): ``[B * n, group, L, D]``.
        keys (mx.array): ``[B * n, 1, end, D]``.
        shares (mx.array): Of the keys that are verticals ``[B * n]``.
    """

    heads: list[int]
    queries: mx.array
    keys: mx.array
    shares: mx.array


@register("select", MINFERENCE)
@dataclass(frozen=True)
class MInference(SelectRule):
    """Read what each key head's pattern says.

    Args:
        last_q (int): Last queries that verticals and slashes are found by. Default: ``64``.
        block (int): Entries a block. Default: ``64``.
    """

    last_q: int = 64
    block: int = 64
    wants_indexer = True
    fills = False
    together = True
    reads = MINFERENCE
    _patterns: ClassVar[Sequence[int]]  # once bound, one a key head
    _shares: ClassVar[Sequence[float]]  # likewise

    def __post_init__(self):
        at_least("select", MINFERENCE, last_q=(self.last_q, 1), block=(self.block, 1))

    def check(self, config):
        if self.block > config.top_k:
            raise ValueError(
                f"[SparseConfig] 'select' 'minference': option 'block' must be at most top_k = {config.top_k} "
                f"but got {self.block}."
            )

    def bind(self, layer, indexer=None, backend="auto"):
        bound = super().bind(layer, indexer, backend)
        if indexer is None:
            return bound
        return bound.with_patterns(indexer.found["pattern"].tolist(), indexer.found["vertical"].tolist())

    def with_patterns(self, patterns: Sequence[int], shares: Sequence[float]) -> MInference:
        """Return the rule with these patterns of key heads, and shares of verticals."""
        return self._with(_patterns=patterns, _shares=shares)

    def scores(self, probe, cache, n_visible, end):
        B, _, L, _ = probe.queries.shape
        total = mx.zeros((B, L, end))
        lines, blocks = (self._heads(probe.queries, cache.keys[:, :, :end], p) for p in (VERTICAL_SLASH, BLOCK_SPARSE))
        if lines.heads:
            vertical, slash = (
                a.reshape(B, -1, end).sum(axis=1) / (2 * min(self.last_q, L)) for a in self._masses(lines, n_visible)
            )
            distance = n_visible.astype(mx.int32)[:, None] - 1 - mx.arange(end, dtype=mx.int32)
            far = mx.take(slash, mx.maximum(distance, 0).flatten(), axis=1).reshape(B, L, end)
            total = total + vertical[:, None] + mx.where(distance >= 0, far, 0)
        if blocks.heads:
            paid = self._blocks(blocks, n_visible)
            paid = paid.reshape(B, -1, *paid.shape[1:]).sum(axis=1) / self.block
            total = total + mx.repeat(paid, self.block, axis=-1)[..., :end]
        return total

    def select(self, probe, cache, top_k, n_visible, end, forced):
        return self.slots(probe.queries, cache.keys[:, :, :end], top_k, n_visible, forced)

    def slots(
        self,
        queries: mx.array,
        keys: mx.array,
        top_k: int,
        n_visible: mx.array,
        forced: tuple[int, int],
        rows: mx.array | None = None,
    ) -> mx.array:
        """Select for queries that are read together.

        Args:
            queries (mx.array): ``[B, Hq, L, D]``.
            keys (mx.array): ``[B, Hkv, end, D]``.
            top_k, n_visible, forced: As in :meth:`SelectRule.select`.
            rows (mx.array, optional): The queries to select for. Default: ``None``, all.

        Returns:
            mx.array: ``[B, Hkv, L, top_k]``, as in :meth:`SelectRule.select`.
        """
        B, n_kv_heads = keys.shape[:2]
        rows = mx.arange(queries.shape[2]) if rows is None else rows
        parts, order = [], []
        for pattern, select in enumerate((self._static, self._lines, self._whole_blocks)):
            some = self._heads(queries, keys, pattern)
            if some.heads:
                slots = select(some, top_k, n_visible, forced, rows)
                parts.append(slots.reshape(B, len(some.heads), *slots.shape[1:]))
                order += some.heads
        slots = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        return slots if order == sorted(order) else slots[:, mx.array([order.index(h) for h in range(n_kv_heads)])]

    def _heads(self, queries, keys, pattern: int) -> Heads:
        """Return the heads of a pattern, each a row of the batch."""
        B, n_kv_heads, end, D = keys.shape
        heads = [h for h, p in enumerate(self._patterns) if p == pattern]
        group, L = queries.shape[1] // n_kv_heads, queries.shape[2]
        if not heads:
            return Heads(heads, queries, keys, mx.zeros(0))
        some = mx.array(heads)
        queries = queries.reshape(B, n_kv_heads, group, L, D)[:, some].reshape(-1, group, L, D)
        shares = mx.array([self._shares[h] for h in heads] * B)
        return Heads(heads, queries, keys[:, some].reshape(-1, 1, end, D), shares)

    # Verticals and slashes.

    def _static(self, some, top_k, n_visible, forced, rows) -> mx.array:
        end = some.keys.shape[2]
        first = mx.broadcast_to(mx.arange(end, dtype=mx.int32), (some.keys.shape[0], end))
        return self._union(first, first, some.shares, top_k, n_visible[rows], forced)

    def _lines(self, some, top_k, n_visible, forced, rows) -> mx.array:
        vertical, slash = self._masses(some, n_visible)
        if some.queries.shape[2] == 1:  # its verticals are its slashes
            return select_topk(vertical[:, None], top_k, n_visible, forced[0], forced[1], self.backend)
        place = mx.arange(vertical.shape[-1], dtype=mx.int32)
        vertical = mx.where(place < forced[0], mx.inf, vertical)
        slash = mx.where(place < forced[1], mx.inf, slash)
        vertical, slash = (
            mx.argsort(order_keys(a, place), axis=-1)[..., ::-1].astype(mx.int32) for a in (vertical, slash)
        )
        return self._union(vertical, slash, some.shares, top_k, n_visible[rows], forced)

    def _masses(self, some: Heads, n_visible) -> tuple[mx.array, mx.array]:
        """Return what the last queries pay to keys, and at distances, in all ``[B * n, end]``."""
        end = some.keys.shape[2]
        n_visible = n_visible[-self.last_q :].astype(mx.int32)[:, None]
        place = mx.arange(end, dtype=mx.int32)
        seen = place < n_visible
        paid = attention_probabilities(some.queries[:, :, -self.last_q :], some.keys, seen, self.layer.scale)
        at = mx.broadcast_to(mx.maximum(n_visible - 1 - place, 0), paid.shape)
        by_distance = mx.where(seen, mx.take_along_axis(paid, at, axis=-1), 0)
        return paid.sum(axis=1), by_distance.sum(axis=1)

    def _union(self, vertical, slash, shares, top_k, n_visible, forced) -> mx.array:
        """Return the slots of the first verticals and distances of orders ``[B * n, end]``."""
        end = vertical.shape[-1]
        count = mx.clip(mx.round(shares * top_k).astype(mx.int32), forced[0], top_k - forced[1])[:, None]
        i = mx.arange(top_k, dtype=mx.int32)
        at = mx.where(i < count, i, i - count)
        lines = [mx.take_along_axis(a, mx.minimum(at, end - 1), axis=-1)[:, None] for a in (vertical, slash)]
        newest = n_visible.astype(mx.int32)[:, None] - 1
        slots = mx.where((i < count)[:, None], lines[0], newest - lines[1])
        slots = mx.sort(mx.where((slots > newest) | (at >= end)[:, None], -1, slots), axis=-1)
        again = slots[..., 1:] == slots[..., :-1]
        slots = mx.concatenate([slots[..., :1], mx.where(again, -1, slots[..., 1:])], axis=-1)
        return mx.sort(mx.maximum(slots, -1), axis=-1)

    # Blocks.

    def _whole_blocks(self, some, top_k, n_visible, forced, rows) -> mx.array:
        n_visible, bounds = n_visible[rows], self._blocks(some, n_visible)[:, rows]
        own = (n_visible.astype(mx.int32)[:, None] - 1) // self.block
        bounds = mx.where(mx.arange(bounds.shape[-1]) == own, mx.inf, bounds)
        return select_pages(bounds, self.block, some.keys.shape[2], top_k, n_visible, *forced)

    def _blocks(self, some: Heads, n_visible) -> mx.array:
        """Return what queries' blocks pay to the blocks before them ``[B * n, L, n_blocks]``."""
        rows, _, end, D = some.keys.shape
        n_whole, own = end // self.block, (n_visible.astype(mx.int32) - 1) // self.block
        together = (own[:, None] == own).astype(mx.float32)
        queries = (together / together.sum(axis=-1, keepdims=True)) @ some.queries.astype(mx.float32)
        keys = some.keys[:, :, : n_whole * self.block].astype(mx.float32)
        keys = keys.reshape(rows, 1, n_whole, self.block, D).mean(axis=3)
        logits = queries @ keys.swapaxes(-1, -2) * self.layer.scale
        before = mx.arange(n_whole) < own[:, None]
        paid = mx.softmax(mx.where(before, logits, -1e30), axis=-1).mean(axis=1)
        paid = mx.where(before, paid, 0)
        return mx.pad(paid, [(0, 0), (0, 0), (0, -(-end // self.block) - n_whole)])
