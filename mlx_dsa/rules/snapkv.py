"""Rules by what the last queries of a prompt attend to.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024; Oren et al.,
Transformers are Multi-State RNNs (TOVA), 2024. Deviations: one set a layer, by the mean over
its heads, as TOVA's (``by_head=true``: one a key head, as SnapKV's); SnapKV's queries are the
last ``observation_window`` of the prompt, and its neighbours count by the largest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..cache import BudgetKVCache
from ..families import Layer
from ..registry import register
from ..selection import pool_neighbours
from .attending import attention_probabilities
from .evict_rule import EvictRule
from .keydiff import POOL_RADIUS
from .rule import at_least


@register("evict", "snapkv")
@dataclass(frozen=True)
class SnapKV(EvictRule):
    """Keep what the last queries of the prompt attend to, and after it what is newer.

    Args:
        pool (int): Positions beside a token that count for it. Default: ``4``.
        by_head (bool): Whether each key head keeps entries of its own. Default: ``False``.
    """

    pool: int = POOL_RADIUS
    by_head: bool = False  # type: ignore[misc]  # an option here, a constant of other rules
    observes = 1
    is_final = True

    # More than any mean of attention: what came after the prompt goes after what came in it.
    _NEWER = 2.0

    def __post_init__(self):
        at_least("evict", "snapkv", pool=(self.pool, 0))

    def score(self, x, offset):
        return mx.full(x.shape[:2], self._NEWER)

    def observed(self, x, offset):
        return self.attention_queries(x, offset)

    def shares(self, worth):
        return worth

    def worth(self, cache):
        return pool_neighbours(_observed_attention(self.layer, cache), cache.positions, self.pool)


@register("evict", "tova")
@dataclass(frozen=True)
class TOVA(EvictRule):
    """Keep what the latest query attends to, at every step."""

    observes = 1
    every_step = True

    def bind(self, *args, **kwargs):
        return super().bind(*args, **kwargs)._with(observes=1)

    def observed(self, x, offset):
        return self.attention_queries(x, offset)

    def shares(self, worth):
        return worth

    def worth(self, cache):
        return _observed_attention(self.layer, cache)

    def step_worth(self, x, cache):
        queries = self.layer.project(x, cache.number).queries
        seen = mx.ones((1, cache.size()), mx.bool_)
        return attention_probabilities(queries, cache.keys, seen, self.layer.scale)[:, 0]


def _observed_attention(layer: Layer, cache: BudgetKVCache) -> mx.array:
    """Return the mean attention that entries are paid by the observed queries that see them."""
    queries, _, positions = cache.observed
    if cache.shift:  # keys have been numbered anew
        back = mx.full((queries.shape[0], queries.shape[2]), -cache.shift, mx.int32)
        queries = layer.turn(queries, back)
    seen = cache.positions[:, None] <= mx.array(positions, mx.int32)[:, None]
    paid = attention_probabilities(queries, cache.keys, seen, layer.scale)
    return paid.sum(axis=1) / mx.maximum(seen.sum(axis=1), 1)
