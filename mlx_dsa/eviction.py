"""Which entries of one layer's budget cache go, and when what is late is made."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .cache import BudgetKVCache
from .config import BY_HEADS, SparseConfig
from .indexer import Indexer
from .ops import index_scores
from .selectors import (
    keydiff_scores,
    lay_last,
    plan_evicted,
    pool_neighbours,
    select_evicted,
    select_kept,
)

# Positions beside a token that are kept with it.
POOL_RADIUS = 4
# Steps for which evictions are planned at once, and for how few it does not pay.
_PLANNED, _PLANNED_FROM = 256, 4


class Eviction:
    """Keep the cache of one layer to its budget.

    Args:
        indexer (Indexer): The layer's indexer, bound to the model.
        config (SparseConfig): What to keep.
        turn (callable, optional): Rotates the layer's keys on, for compact positions: see
          :meth:`BudgetKVCache.renumber`. Default: ``None``.

    Attributes:
        rule (str): ``config.evict``, or ``"keydiff"`` where it wants a retention head and
          there is none.
    """

    def __init__(
        self,
        indexer: Indexer,
        config: SparseConfig,
        turn: Callable[[mx.array, mx.array], mx.array] | None = None,
    ):
        self._indexer = indexer
        self._config = config
        self._turn = turn if config.positions == "compact" else None
        self._forced = config.n_sink, config.n_recent
        self.rule = config.evict
        if config.evict in BY_HEADS and not indexer.has_retention:
            self.rule = "keydiff"

    def project(self, x: mx.array, offset: int) -> list[mx.array]:
        """Compute what a budget cache keeps beside keys and values.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.

        Returns:
            list of mx.array: Index keys ``[B, 1, L, Di]``, and where they decide the
            scores of the retention head, twice, ``[B, 1, L, 2]`` in float32.
        """
        if self.rule not in BY_HEADS:
            return [self._indexer.project_keys(x, offset)]
        index_keys, retention = self._indexer.project_entries(x, offset)
        twice = (x.shape[0], 1, x.shape[1], 2)
        return [index_keys, mx.broadcast_to(retention[:, None, :, None], twice)]

    def observe(self, x: mx.array, cache: BudgetKVCache):
        """Remember the last queries of a prompt, after their append, where they decide.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            cache (BudgetKVCache): Changed in place.
        """
        if self.rule == "index":
            n = min(x.shape[1], self._config.observation_window)
            window = self._indexer.project_queries(x[:, -n:], cache.offset - n)
            cache.observe(*window, self._config.observation_window)

    def make_room(self, cache: BudgetKVCache):
        """Decide which entries the next steps replace, where that is planned, and nothing
        is planned yet.

        Args:
            cache (BudgetKVCache): A full cache, changed in place; with compact positions
              its entries are numbered anew.
        """
        # Recent entries are never dropped, so their scores may come late.
        if cache.n_late >= min(self._config.n_recent, cache.most_late):
            cache.settle(self.project)
        if self._plans and not cache.n_planned:
            # What entries are worth is decided, and no younger one can go before.
            cache.settle(self.project)
            cache.sort()
            cache.plan(*self._plan(self._worth(cache), cache.size()))
            self._renumber(cache)

    def replace(self, x: mx.array, keys: mx.array, values: mx.array, cache: BudgetKVCache):
        """Write a token's entry over the one that is worth least, after :meth:`make_room`.

        Args:
            x (mx.array): The token's normalised hidden state ``[B, 1, dim]``.
            keys (mx.array): ``[B, Hkv, 1, D]``.
            values (mx.array): ``[B, Hkv, 1, D]``.
            cache (BudgetKVCache): A full cache, changed in place.
        """
        if self._plans:
            cache.replace_planned(keys, values, x)
        else:
            cache.replace(self._least(x, cache), keys, values, x)

    @property
    def _plans(self) -> bool:
        return steps_planned(self._config) > 0

    def _plan(self, worth, size) -> tuple[mx.array, int]:
        n_steps = min(self._config.n_recent, _PLANNED)
        evicted = plan_evicted(worth, size, n_steps, *self._forced)
        return lay_last(evicted, size), n_steps

    def _worth(self, cache) -> mx.array | None:
        """Return what entries of a sorted cache are worth, whatever is asked later."""
        return _LIKENESS[self.rule](cache) if self.rule in _LIKENESS else cache.worth

    def _least(self, x, cache) -> mx.array:
        if self.rule in _LIKENESS:
            cache.settle(self.project)  # what is late knows its slots as they were
            cache.sort()
        scores = self._worth(cache)
        if self.rule == "index":
            queries = self._indexer.project_queries(x, cache.offset)
            scores = self._score(*queries, cache.index_keys)[:, 0]
        return select_evicted(scores, cache.positions, cache.offset, *self._forced)

    def prune(self, cache: BudgetKVCache, decoding: bool = False):
        """Cut a cache to its budget, where it holds more, as at the end of a prompt.

        Args:
            cache (BudgetKVCache): The cache, changed in place.
            decoding (bool): Whether steps of decode follow: what they replace is then
              planned at once, so that the entries move only once.
              Default: ``False``.
        """
        cache.settle(self.project)
        if cache.size() <= cache.budget:
            cache.window = None
            return
        scores, worth = self._prompt_scores(cache)
        backend = self._config.backend
        slots = select_kept(scores, cache.size(), cache.budget, *self._forced, backend)
        n_planned = 0
        # How much a key is like the others changes with them.
        if decoding and self._plans and self.rule not in _LIKENESS:
            kept = None if scores is None else mx.take_along_axis(scores, slots, axis=1)
            order, n_planned = self._plan(kept, cache.budget)
            slots = mx.take_along_axis(slots, order, axis=1)
        cache.prune(slots, worth, n_planned)
        self._renumber(cache)

    def _renumber(self, cache):
        if self._turn is not None:
            cache.renumber(self._turn)

    def cut(self, cache: BudgetKVCache):
        """Cut a cache to its budget, as :meth:`prune` does, where its prompt goes on.

        Args:
            cache (BudgetKVCache): The cache, changed in place; the observed queries stay, so
              that as many decide at the prompt's end, however near the last cut is.
        """
        window = cache.window
        self.prune(cache)
        cache.window = window

    def _prompt_scores(self, cache) -> tuple[mx.array | None, mx.array | None]:
        """Return what orders the entries ``[B, size]`` at the end of a prompt, and where it
        stands for later evictions too, the same again."""
        if self.rule == "index":
            return self._window_scores(cache), None
        if self.rule in _LIKENESS:
            return _LIKENESS[self.rule](cache), None
        if self.rule == "retention":
            scores = pool_neighbours(cache.retention, cache.positions, POOL_RADIUS)
            return scores, scores
        return None, None

    def _window_scores(self, cache) -> mx.array:
        """Average each entry's scores over the observed queries that see it."""
        queries, weights, positions = cache.window
        scores = self._score(queries, weights, cache.index_keys)
        seen = cache.positions[:, None] <= mx.array(positions, mx.int32)[:, None]
        total = mx.where(seen, scores, 0).sum(axis=1)
        return total / seen.sum(axis=1)

    def _score(self, queries, weights, index_keys) -> mx.array:
        return index_scores(queries, weights, index_keys, self._config.backend)


def steps_planned(config: SparseConfig) -> int:
    """Return for how many steps of decode evictions are planned at once; 0 where they aren't."""
    planned = config.evict != "index" and config.n_recent >= _PLANNED_FROM
    return min(config.n_recent, _PLANNED) if planned else 0


def _keydiff(cache: BudgetKVCache) -> mx.array:
    scores = keydiff_scores(cache.keys)
    return pool_neighbours(scores, cache.positions, POOL_RADIUS)


def _blend(cache: BudgetKVCache) -> mx.array:
    retention = pool_neighbours(cache.retention, cache.positions, POOL_RADIUS)
    return _standardised(retention) + _standardised(_keydiff(cache))


def _standardised(scores: mx.array) -> mx.array:
    mean, variance = (f(axis=-1, keepdims=True) for f in (scores.mean, scores.var))
    return (scores - mean) * mx.rsqrt(variance + 1e-12)


# Rules by how much a key is like the others: that changes with them.
_LIKENESS = {"keydiff": _keydiff, "blend": _blend}
