"""Rules that look at the keys alone.

Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments, 2025; Devoto et al., A Simple and Effective L2 Norm-Based
Strategy for KV Cache Compression, 2024. Deviations: one set a layer, by the mean over its key
heads (``by_head=true``: one a key head, as theirs); a token is worth what the best of its
neighbours is (``pool``, 0 for none, as theirs).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from ..selection import keydiff_scores, pool_neighbours
from .evict_rule import EvictRule
from .rule import at_least

# Positions beside a token that are kept with it.
POOL_RADIUS = 4


@register("evict", "keydiff")
@dataclass(frozen=True)
class KeyDiff(EvictRule):
    """Forget the keys that are most like the others.

    Args:
        pool (int): Positions beside a token that count for it. Default: ``4``.
        by_head (bool): Whether each key head keeps entries of its own. Default: ``False``.
    """

    pool: int = POOL_RADIUS
    by_head: bool = False  # type: ignore[misc]  # an option here, a constant of other rules

    def __post_init__(self):
        at_least("evict", "keydiff", pool=(self.pool, 0))

    def worth(self, cache):
        return pool_neighbours(keydiff_scores(cache.keys), cache.positions, self.pool)


@register("evict", "knorm")
@dataclass(frozen=True)
class KeyNorm(EvictRule):
    """Forget the keys of the largest norm.

    Args:
        pool (int): Positions beside a token that count for it. Default: ``0``.
        by_head (bool): Whether each key head keeps entries of its own. Default: ``False``.
    """

    pool: int = 0
    by_head: bool = False  # type: ignore[misc]  # an option here, a constant of other rules

    def __post_init__(self):
        at_least("evict", "knorm", pool=(self.pool, 0))

    def worth(self, cache):
        norms = mx.linalg.norm(cache.keys.astype(mx.float32), axis=-1)
        return pool_neighbours(-norms.mean(axis=1), cache.positions, self.pool)
