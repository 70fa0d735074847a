"""What any rule must beat: sinks and the newest tokens, chance; and the best, the true attention."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .attending import attention_probabilities
from .evict_rule import EvictRule
from .select_rule import SelectRule


@register("select", "window")
@dataclass(frozen=True)
class SelectWindow(SelectRule):
    """Read the sinks and the newest keys."""

    by_position = True

    def scores(self, probe, cache, n_visible, end):
        B, _, L, _ = probe.queries.shape
        return mx.broadcast_to(cache.positions[:, None, :end].astype(mx.float32), (B, L, end))


@register("evict", "window")
@dataclass(frozen=True)
class EvictWindow(EvictRule):
    """Keep the sinks and the newest entries (Xiao et al., Efficient Streaming Language Models
    with Attention Sinks, 2023, but for positions, which are a setting of their own)."""

    is_final = True

    def worth(self, cache):
        return None


@register("select", "random")
@dataclass(frozen=True)
class SelectRandom(SelectRule):
    """Read keys drawn by chance, one set a layer.

    Args:
        seed (int): Of the draw. Default: ``0``.
    """

    seed: int = 0
    by_position = True

    def scores(self, probe, cache, n_visible, end):
        B, _, L, _ = probe.queries.shape
        drawn = _draw(cache.positions[:, :end], self.seed, self.layer.index)
        return mx.broadcast_to(drawn[:, None], (B, L, end))


@register("evict", "random")
@dataclass(frozen=True)
class EvictRandom(EvictRule):
    """Keep entries drawn by chance, one set a layer.

    Args:
        seed (int): Of the draw. Default: ``0``.
    """

    seed: int = 0

    def worth(self, cache):
        return _draw(cache.positions, self.seed, self.layer.index)


def _draw(positions: mx.array, seed: int, layer: int) -> mx.array:
    """Draw a number for each position, the same wherever a text is cut ``[B, T]``."""
    x = positions.astype(mx.uint32) + mx.array((seed * 1_000_003 + layer * 7919) % 2**32, mx.uint32)
    for multiplier in (0x7FEB352D, 0x846CA68B):  # of a mixing hash: each bit changes half of them
        x = (x ^ (x >> 16)) * mx.array(multiplier, mx.uint32)
    return (x ^ (x >> 16)).astype(mx.float32)


@register("select", "oracle")
@dataclass(frozen=True)
class Oracle(SelectRule):
    """Read the keys that the attention itself pays most to, on the mean of its heads."""

    def scores(self, probe, cache, n_visible, end):
        seen = mx.arange(end) < n_visible[:, None]
        keys = cache.keys[:, :, :end]
        return attention_probabilities(probe.queries, keys, seen, self.layer.scale)
