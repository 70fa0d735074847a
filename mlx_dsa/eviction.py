"""Which entries of one layer's budget cache go, and when what is late is made."""

from __future__ import annotations

import mlx.core as mx

from .cache import BudgetKVCache
from .config import SparseConfig
from .indexer import Indexer
from .ops import index_scores
from .selectors import plan_evicted, pool_neighbours, select_evicted, select_kept

# Positions beside a token that are kept with it.
_POOL_RADIUS = 4
# Steps for which evictions are planned at once, and for how few it does not pay.
_PLANNED, _PLANNED_FROM = 64, 4
# Without a plan: steps after which what they left open is made for all of them.
_LATE = 32


class Eviction:
    """Keep the cache of one layer to its budget.

    Args:
        indexer (Indexer): The layer's indexer, bound to the model.
        config (SparseConfig): What to keep.

    Attributes:
        rule (str): ``config.evict``, or ``"index"`` where there is no retention head.
    """

    def __init__(self, indexer: Indexer, config: SparseConfig):
        self._indexer = indexer
        self._config = config
        self._forced = config.n_sink, config.n_recent
        self.rule = config.evict
        if config.evict == "retention" and not indexer.has_retention:
            self.rule = "index"

    def project(self, x: mx.array, offset: int) -> list[mx.array]:
        """Compute what a budget cache keeps beside keys and values.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.

        Returns:
            list of mx.array: Index keys ``[B, 1, L, Di]``, and where they decide the
            scores of the retention head, twice, ``[B, 1, L, 2]`` in float32.
        """
        entries = [self._indexer.project_keys(x, offset)]
        if self.rule == "retention":
            retention = self._indexer.retention(x)
            entries.append(mx.stack([retention, retention], axis=-1)[:, None])
        return entries

    def replace(self, x: mx.array, keys: mx.array, values: mx.array, cache: BudgetKVCache):
        """Write a token's entry over the one that is worth least.

        Args:
            x (mx.array): The token's normalised hidden state ``[B, 1, dim]``.
            keys (mx.array): ``[B, Hkv, 1, D]``.
            values (mx.array): ``[B, Hkv, 1, D]``.
            cache (BudgetKVCache): A full cache, changed in place.
        """
        n_recent = self._config.n_recent
        if self.rule == "index" or n_recent < _PLANNED_FROM:
            slots = self._least(x, cache)
            cache.replace(slots, keys, values, x)
            return
        if not cache.n_planned:
            # What entries are worth is decided, and no younger one can go before.
            cache.settle(self.project)
            cache.sort()
            n_steps = min(n_recent, _PLANNED)
            cache.plan(plan_evicted(cache.worth, cache.size(), n_steps, *self._forced))
        cache.replace_planned(keys, values, x)

    def _least(self, x, cache) -> mx.array:
        # Recent entries are never dropped, so their scores may come late.
        if cache.n_late >= min(self._config.n_recent, _LATE):
            cache.settle(self.project)
        scores = cache.worth
        if self.rule == "index":
            queries = self._indexer.project_queries(x, cache.offset)
            scores = self._score(*queries, cache.index_keys)[:, 0]
        return select_evicted(scores, cache.positions, cache.offset, *self._forced)

    def prune(self, cache: BudgetKVCache):
        """Cut a cache to its budget, where it holds more, as at the end of a prompt.

        Args:
            cache (BudgetKVCache): The cache, changed in place.
        """
        cache.settle(self.project)
        if cache.size() <= cache.budget:
            return
        scores = worth = None
        if self.rule == "index":
            scores = self._window_scores(cache)
        elif self.rule == "retention":
            scores = worth = pool_neighbours(
                cache.retention, cache.positions, _POOL_RADIUS
            )
        slots = select_kept(scores, cache.size(), cache.budget, *self._forced)
        cache.prune(slots, worth)

    def _window_scores(self, cache) -> mx.array:
        """Average each entry's scores over the observed queries that see it."""
        queries, weights, positions = cache.window
        scores = self._score(queries, weights, cache.index_keys)
        seen = cache.positions[:, None] <= mx.array(positions, mx.int32)[:, None]
        total = mx.where(seen, scores, 0).sum(axis=1)
        return total / seen.sum(axis=1)

    def _score(self, queries, weights, index_keys) -> mx.array:
        return index_scores(queries, weights, index_keys, self._config.backend)
