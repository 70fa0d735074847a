"""Trained search projections by an approximate index: candidates from a graph, scored exactly.

Malkov and Yashunin, Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical
Navigable Small World Graphs, 2016, by usearch; the use for attention is that of unixsysdev,
ann-sparseattention, 2026. Deviations: vectors are added in order by one thread, so that an index
is one and the same for every run and cut; entries that are newer than the index (the queries' own
call and ``n_recent`` before it) are scored exactly, so what a prompt's queries read depends on
where its calls end; tiles of queries are scored exactly, as by ``projections``. It runs on the
CPU: at each layer the device is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.reference import order_keys
from ..registry import register
from .projections import SelectProjections
from .rule import at_least

# Numbers of the candidates' keys that are gathered at once.
_BLOCK = 1 << 24


@register("select", "hnsw")
@dataclass(frozen=True)
class SelectHNSW(SelectProjections):
    """Find candidates in a graph that grows with the text, and take the best of them.

    Args:
        m (int): Neighbours a vector has in the graph. Default: ``16``.
        build (int): Vectors looked at when one is added. Default: ``64``.
        ef (int): Vectors looked at when one is sought, at least. Default: ``64``.
        over (int): Candidates for each key that is read. Default: ``2``.
    """

    m: int = 16
    build: int = 64
    ef: int = 64
    over: int = 2

    def __post_init__(self):
        options = {"m": (self.m, 2), "build": (self.build, 1), "ef": (self.ef, 1)}
        at_least("select", "hnsw", **options, over=(self.over, 1))

    def check(self, config):
        if config.cache != "full":
            raise ValueError(
                f"[SparseConfig] select 'hnsw' searches a cache that keeps every entry, but "
                f"'cache' is {config.cache!r}. Use cache='full', or select='projections'."
            )

    def bind(self, layer, indexer=None, backend="auto"):
        if indexer is not None:
            _usearch()
        return super().bind(layer, indexer, backend)

    def select(self, probe, cache, top_k, n_visible, end, forced):
        n_sink, n_recent = forced
        B, _, L, _ = probe.queries.shape
        n_visible = n_visible.astype(mx.int32)
        least = int(n_visible[0].item())
        first = least - 1
        # Queries that are not the newest can't be served by an index of what is older.
        grown = self._index(cache, max(0, first - n_recent) if end - first == L else end)
        queries = probe.queries[:, 0].astype(mx.float32)
        found = mx.array(grown.search(np.array(queries), self.over * top_k, least))
        tail = mx.arange(grown.size, end, dtype=mx.int32)
        recent = n_visible[:, None] - mx.arange(1, n_recent + 1, dtype=mx.int32)
        sinks = mx.broadcast_to(mx.arange(min(n_sink, end), dtype=mx.int32), (L, min(n_sink, end)))
        always = mx.concatenate([sinks, mx.where(recent < n_sink, -1, recent)], axis=-1)
        keys = cache.index_keys[:, 0, :end]
        slots = mx.concatenate(
            [
                mx.broadcast_to(always, (B, *always.shape)),
                mx.broadcast_to(tail, (B, L, tail.size)),
                found,
            ],
            axis=-1,
        )
        seen = n_visible[:, None]
        scores = mx.concatenate(
            [
                mx.full((B, *always.shape), mx.inf),
                queries @ keys[:, grown.size :].astype(mx.float32).swapaxes(-1, -2),
                _products(queries, keys, found),
            ],
            axis=-1,
        )
        forced_too = (slots < n_sink) | (slots >= seen - n_recent)
        forced_too &= mx.arange(slots.shape[-1]) >= always.shape[-1]
        unusable = (slots < 0) | (slots >= seen) | forced_too
        slots = mx.where(unusable, -1, slots)
        order = order_keys(mx.where(unusable, -mx.inf, scores), mx.maximum(slots, 0))
        best = mx.argsort(order, axis=-1)[..., -top_k:]
        chosen = mx.take_along_axis(slots, best, axis=-1)
        missing = top_k - chosen.shape[-1]
        if missing > 0:
            chosen = mx.pad(chosen, [(0, 0), (0, 0), (missing, 0)], constant_values=-1)
        return mx.sort(chosen, axis=-1)

    def _index(self, cache, size: int) -> GrowingIndex:
        """Return the cache's index, with its first ``size`` entries at least."""
        index = cache.companion
        if not isinstance(index, GrowingIndex) or index.rule != self:
            index = cache.companion = GrowingIndex(self)
        if size > index.size:
            new = cache.index_keys[:, 0, index.size : size].astype(mx.float32)
            index.add(np.array(new))
        return index


class GrowingIndex:
    """A graph of the search keys of each row of a cache, added to as the cache grows.

    Args:
        rule (SelectHNSW): Gives the graph's settings.

    Attributes:
        size (int): Entries in it, the cache's first ones.
    """

    def __init__(self, rule: SelectHNSW):
        self.rule = rule
        self.size = 0
        self._rows: list[Any] = []

    def __deepcopy__(self, memo) -> GrowingIndex:
        # A graph can't be copied: a copy of a cache makes its own when it is searched.
        return GrowingIndex(self.rule)

    def add(self, keys: np.ndarray):
        """Add entries after those that are there: ``[B, n, d]``, float32."""
        if not self._rows:
            make, rule = _usearch().Index, self.rule
            settings = {
                "connectivity": rule.m,
                "expansion_add": rule.build,
                "expansion_search": rule.ef,
            }
            d = keys.shape[2]
            self._rows = [make(ndim=d, metric="ip", dtype="f32", **settings) for _ in keys]
        labels = np.arange(self.size, self.size + keys.shape[1], dtype=np.uint64)
        for row, new in zip(self._rows, keys):
            row.add(labels, new, threads=1)  # by several threads no two graphs are alike
        self.size += keys.shape[1]

    def trim(self, size: int):
        """Take back what stands after the first ``size`` entries."""
        if size < self.size:
            gone = np.arange(size, self.size, dtype=np.uint64)
            for row in self._rows:
                row.remove(gone)
            self.size = size

    def search(self, queries: np.ndarray, n: int, n_visible: int) -> np.ndarray:
        """Find the entries nearest to queries.

        Args:
            queries (np.ndarray): ``[B, L, d]``, float32.
            n (int): Entries wanted a query.
            n_visible (int): Entries that each query sees at least: more are fetched where
              the index has others.

        Returns:
            np.ndarray: Slots ``[B, L, m]``, int32, -1 for none.
        """
        B, L, _ = queries.shape
        n = min(self.size, n * -(-self.size // n_visible))
        slots = np.full((B, L, n), -1, np.int32)
        for row, wanted, out in zip(self._rows if n else (), queries, slots):
            found = row.search(wanted, n)
            keys, counts = found.keys.reshape(L, -1), np.reshape(getattr(found, "counts", n), -1)
            # Past its count a row holds key 0, which is an entry's.
            there = np.arange(keys.shape[1]) < counts[:, None]
            out[:, : keys.shape[1]] = np.where(there, keys.astype(np.int64), -1)
        return slots


def _products(queries, keys, slots) -> mx.array:
    """Return the products of queries ``[B, L, d]`` and the keys of slots ``[B, L, n]``."""
    B, L, n = slots.shape
    if not n:
        return mx.zeros((B, L, 0))
    rows = max(1, _BLOCK // (B * n * keys.shape[-1]))
    parts = []
    for i in range(0, L, rows):
        part = mx.maximum(slots[:, i : i + rows], 0)
        near = mx.take_along_axis(keys, part.reshape(B, -1, 1), axis=1).astype(mx.float32)
        near = near.reshape(*part.shape, -1)
        parts.append((near @ queries[:, i : i + rows, :, None])[..., 0])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError:
        raise ValueError("[SparseConfig] select 'hnsw' needs usearch. Run pip install 'mlx-dsa[hnsw]'.") from None
    return usearch.index
