"""Which entries of one layer's budget cache go, and when what is late is made."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .cache import BudgetKVCache
from .config import SparseConfig
from .registry import make_rule
from .rules import EvictRule
from .selection import lay_last, plan_evicted, select_evicted, select_kept

# Steps for which evictions are planned at once, and for how few it does not pay.
_PLANNED, _PLANNED_FROM = 256, 4


class Eviction:
    """Keep the cache of one layer to its budget.

    Args:
        rule (EvictRule): What orders entries, bound to the layer.
        config (SparseConfig): What to keep.
        turn (callable, optional): Rotates the layer's keys on, for compact positions: see
          :meth:`BudgetKVCache.renumber`. Default: ``None``.

    Attributes:
        project (callable): The rule's :meth:`EvictRule.project`.
    """

    def __init__(
        self,
        rule: EvictRule,
        config: SparseConfig,
        turn: Callable[[mx.array, mx.array], mx.array] | None = None,
    ):
        self.rule = rule
        self.project = rule.project
        self._config = config
        self._turn = turn if config.positions == "compact" else None
        self._forced = config.n_sink, config.n_recent

    def observe(self, x: mx.array, cache: BudgetKVCache, queries: mx.array | None = None):
        """Remember the last queries of a prompt, after their append, where they decide.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            cache (BudgetKVCache): Changed in place.
            queries (mx.array, optional): The layer's ``[B, Hq, L, D]``, where at hand.
        """
        limit = self.rule.observes
        if limit:
            n = min(x.shape[1], limit)
            cache.observe(*self.rule.observed(x[:, -n:], cache.offset - n), limit)
        self.credit(x, cache, queries)

    def credit(self, x: mx.array, cache: BudgetKVCache, queries: mx.array | None = None):
        """Let new queries add to what entries are worth, where the rule says so.

        Args:
            x (mx.array): Their normalised hidden states ``[B, L, dim]``.
            cache (BudgetKVCache): Their entries the newest; changed in place.
            queries (mx.array, optional): The layer's ``[B, Hq, L, D]``, where at hand.
        """
        if not self.rule.credits:
            return
        cache.settle(self.project)  # or a late entry's first score would go over it
        if queries is None:
            probe = self.rule.attention_queries(x, cache.number - x.shape[1])
            queries = probe.queries
        cache.worth = cache.worth + self.rule.credit(cache, queries)

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
        if self.plans and not cache.n_planned:
            # What entries are worth is decided, and no younger one can go before.
            cache.settle(self.project)
            cache.sort()
            cache.plan(*self._plan(self._worth(cache), cache.size()))
            self._renumber(cache)

    def replace(
        self,
        x: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: BudgetKVCache,
        queries: mx.array | None = None,
    ):
        """Write a token's entry over the one that is worth least, after :meth:`make_room`.

        Args:
            x (mx.array): The token's normalised hidden state ``[B, 1, dim]``.
            keys (mx.array): ``[B, Hkv, 1, D]``.
            values (mx.array): ``[B, Hkv, 1, D]``.
            cache (BudgetKVCache): A full cache, changed in place.
            queries (mx.array, optional): Its queries ``[B, Hq, 1, D]``, where at hand.
        """
        if self.plans:
            cache.replace_planned(keys, values, x)
        else:
            cache.replace(self._least(x, cache), keys, values, x)
            self.credit(x, cache, queries)

    @property
    def plans(self) -> bool:
        """Whether evictions are planned for many steps at once."""
        return steps_planned(self._config, self.rule) > 0

    def _plan(self, worth, size) -> tuple[mx.array, int]:
        n_steps = min(self._config.n_recent, _PLANNED)
        evicted = plan_evicted(worth, size, n_steps, *self._forced)
        return lay_last(evicted, size), n_steps

    def _worth(self, cache) -> mx.array | None:
        """Return what entries of a sorted cache are worth, whatever is asked later."""
        worth = cache.worth if self.rule.is_final else None
        return self.rule.worth(cache) if worth is None else worth

    def _least(self, x, cache) -> mx.array:
        if self.rule.every_step:
            scores = self.rule.step_worth(x, cache)
        else:
            if not self.rule.is_final:
                cache.settle(self.project)  # what is late knows its slots as they were
                cache.sort()
            scores = self._worth(cache)
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
            cache.observed = None
            return
        # What was observed can have been taken back.
        blind = self.rule.observes and cache.observed is None
        scores = None if blind else self.rule.worth(cache)
        worth = scores if self.rule.is_final and cache.worth is not None else None
        backend = self._config.backend
        slots = select_kept(scores, cache.size(), cache.budget, *self._forced, backend)
        if self.rule.merges:
            cache.write_values(slots, self.rule.merged(cache, slots, scores))
        n_planned = 0
        if decoding and self.plans and self.rule.is_final:
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
        observed = cache.observed
        self.prune(cache)
        cache.observed = observed


def steps_planned(config: SparseConfig, rule: EvictRule | None = None) -> int:
    """Return for how many steps of decode evictions are planned at once; 0 where they aren't.

    Args:
        config (SparseConfig): What to keep.
        rule (EvictRule, optional): In place of the config's. Default: ``None``.
    """
    every_step = (rule or make_rule("evict", config.evict)).every_step
    planned = not every_step and config.n_recent >= _PLANNED_FROM
    return min(config.n_recent, _PLANNED) if planned else 0
