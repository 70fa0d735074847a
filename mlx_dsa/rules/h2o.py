"""Heavy hitters: entries by all attention that they have been paid so far.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models, 2023. Deviations: one set a layer, by the mean over its heads; the recent tokens are
``n_recent`` of the settings, not half of the budget; a prompt is read as its prefill says, and
cut once it has been read. Steps of decode accumulate as the queries of a prompt do. Attention is
reckoned a second time for it, of every query to every entry. What queries paid that are taken
back (``trim``) stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .attending import attention_received
from .evict_rule import EvictRule


@register("evict", "h2o")
@dataclass(frozen=True)
class H2O(EvictRule):
    """Keep what all queries so far have attended to most.

    Args:
        mean (bool): Divide by the number of tokens since, an entry's own counted: the old have
            been paid oftener. Default: ``False``.
    """

    mean: bool = False
    every_step = True
    credits = True

    def score(self, x, offset):
        return mx.zeros(x.shape[:2], mx.float32)

    def credit(self, cache, queries):
        asked_at = mx.arange(cache.offset - queries.shape[2], cache.offset)
        held = cache.keys, asked_at, cache.positions
        return attention_received(queries, *held, self.layer.scale)

    def worth(self, cache):
        return cache.worth / (cache.offset - cache.positions) if self.mean else cache.worth

    def shares(self, worth):
        return worth

    def step_worth(self, x, cache):
        return self.worth(cache)
