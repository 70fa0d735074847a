"""The trained retention head, alone or with KeyDiff.

The head learns KVzip's kind of target early, when a token is read: Kim et al., KVzip:
Query-Agnostic KV Cache Compression with Context Reconstruction, 2025; Jegou and Jeblick,
KVzap: Fast, Adaptive, and Faithful KV Cache Pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..registry import register
from ..selection import keydiff_scores, pool_neighbours
from .evict_rule import EvictRule
from .keydiff import POOL_RADIUS
from .lightning import Lightning


@register("evict", "retention")
@dataclass(frozen=True)
class Retention(EvictRule):
    """Keep what the retention head says that later queries will need."""

    wants_indexer = True
    wants_head = True
    is_final: ClassVar[bool] = True

    def score(self, x, offset):
        return self.indexer.retention(x)

    def project(self, x, offset):
        if not isinstance(self.selecting, Lightning):
            return super().project(x, offset)
        return self._entries(*self.indexer.project_entries(x, offset))  # one product

    def worth(self, cache):
        return pool_neighbours(cache.retention, cache.positions, POOL_RADIUS)

    def shares(self, worth):
        return mx.exp(worth)  # it is the logarithm of an attention


@register("evict", "blend")
@dataclass(frozen=True)
class Blend(Retention):
    """Add the head's scores and KeyDiff's, each standardised."""

    is_final = False  # how much a key is like the others changes with them

    def worth(self, cache):
        alike = pool_neighbours(keydiff_scores(cache.keys), cache.positions, POOL_RADIUS)
        return _standardised(super().worth(cache)) + _standardised(alike)

    def shares(self, worth):
        return None


def _standardised(scores: mx.array) -> mx.array:
    mean, variance = (f(axis=-1, keepdims=True) for f in (scores.mean, scores.var))
    return (scores - mean) * mx.rsqrt(variance + 1e-12)
