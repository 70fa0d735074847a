"""Entries by how much they vary in the measure of what follows.

Liang et al., LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important,
2025. Deviations: one set a layer, by the mean over its key heads; a prompt is cut once, at its
end; partitions are of what is in the cache then. What always stays, the last whole partition and
what follows, is up to twice ``lag``: a budget below that is a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .evict_rule import EvictRule
from .rule import at_least


@register("evict", "lagkv")
@dataclass(frozen=True)
class LagKV(EvictRule):
    """Keep, of each partition, what deviates most by the range of the next one.

    Args:
        lag (int): Entries of a partition; the last whole one and what follows stay.
            Default: ``128``.
        sinks (int): First entries, which are in no partition and stay. Default: ``4``.
    """

    lag: int = 128
    sinks: int = 4

    def __post_init__(self):
        at_least("evict", "lagkv", lag=(self.lag, 2), sinks=(self.sinks, 0))

    def worth(self, cache):
        B, n_heads, T, _ = cache.keys.shape
        parts = max(0, T - self.sinks) // self.lag
        if parts < 2:
            return mx.broadcast_to(mx.arange(T, dtype=mx.float32) / T, (B, T))
        end = self.sinks + parts * self.lag
        total = mx.array(0)
        for h in range(n_heads):
            of = (x[:, h, self.sinks : end] for x in (cache.keys, cache.values))
            keys, values = (self._deviations(x.reshape(B, parts, self.lag, -1)) for x in of)
            ranks = mx.argsort(mx.argsort(keys + values, axis=-1), axis=-1)
            total = total + ranks.astype(mx.int32)  # whole numbers: what is equal is so exactly
        scored = (total.astype(mx.float32) / (n_heads * self.lag)).reshape(B, -1)
        stays = mx.ones((B, self.sinks)), mx.ones((B, T - end + self.lag))
        return mx.concatenate([stays[0], scored, stays[1]], axis=1)

    def _deviations(self, x: mx.array) -> mx.array:
        """Score partitions ``[B, n, lag, D]`` but the last by the next one ``[B, n - 1, lag]``."""
        x = x.astype(mx.float32)
        low = x[:, 1:].min(axis=2, keepdims=True)
        high = x[:, 1:].max(axis=2, keepdims=True)
        scaled = (x[:, :-1] - low) / mx.maximum(high - low, 1e-12)
        return mx.softmax(mx.std(scaled, axis=-1, ddof=1), axis=-1)
