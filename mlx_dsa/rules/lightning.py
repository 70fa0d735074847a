"""The lightning indexer: its scores select keys; those of the last queries may order entries.

DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse
Attention, 2025. No deviation; what orders entries for eviction is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..ops import index_scores, tile_scores
from ..registry import register, rule_class
from .evict_rule import EvictRule
from .rule import Probe
from .select_rule import SelectRule


@register("select", "lightning")
@dataclass(frozen=True)
class Lightning(SelectRule):
    """Score keys by the layer's trained indexer."""

    wants_indexer = True
    keeps_entry = True

    def entry_width(self):
        return self.indexer.args.index_head_dim

    def entry(self, x, offset):
        return self.indexer.project_keys(x, offset)

    def probe(self, x, offset, queries=None):
        return Probe(*self.indexer.project_queries(x, offset))

    def step(self, x, offset, queries=None):
        keys, *probe = self.indexer.project(x, offset)
        return keys, Probe(*probe)

    def scores(self, probe, cache, n_visible, end):
        return index_scores(probe.queries, probe.weights, cache.index_keys[:, :, :end], self.backend)

    def tile_scores(self, probe, cache, tile_size, end, first):
        index_keys = cache.index_keys[:, :, : end - tile_size]
        return tile_scores(probe.queries, probe.weights, index_keys, tile_size, first, self.backend)


@register("evict", "index")
@dataclass(frozen=True)
class Index(EvictRule):
    """Keep what the last queries score highest, by the rule that selects."""

    observes = 1
    every_step = True

    def check(self, config):
        select = rule_class("select", config.select)
        if config.cache == "budget" and not (select.keeps_entry or select.by_position):
            raise ValueError(
                f"[SparseConfig] evict 'index' orders entries by what a rule of selecting keeps of "
                f"them, and select {config.select!r} keeps nothing. Use evict='tova' or 'snapkv', "
                f"or select='lightning'."
            )

    def worth(self, cache):
        *probe, positions = cache.observed
        scores = self._all_scores(Probe(*probe), cache)
        seen = cache.positions[:, None] <= mx.array(positions, mx.int32)[:, None]
        total = mx.where(seen, scores, 0).sum(axis=1)
        return total / seen.sum(axis=1)

    def step_worth(self, x, cache):
        probe = self.selecting.probe(x, cache.offset)
        return self._all_scores(probe, cache)[:, 0]

    def _all_scores(self, probe, cache) -> mx.array:
        size = cache.size()
        n_visible = mx.full((probe.queries.shape[2],), size)
        return self.selecting.scores(probe, cache, n_visible, size)
