"""What is dropped goes into the values of what stays.

After Li et al., EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based
on Global-Local Importance, 2024: what is worth least is dropped, what is worth more is merged
into the entries that stay, each into the one whose key is most like its own, or into none.
Deviations: what stays is chosen by another rule, one set a layer, since the paper's score wants
the attention of every query; as many are merged as stay, not a number for each head; likeness is
of keys, not of values too; weights are by that rule's worth where this is an attention or its
logarithm, else equal; keys stay as they are, for those of several positions have no rotation in
common; steps of decode drop without a merge. The threshold is this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx

from ..registry import make_rule, register
from ..selection import select_kept
from .evict_rule import EvictRule
from .rule import Rule

# Numbers of a block of similarities: entries are merged some at a time.
_BLOCK = 1 << 26


@register("evict", "ems")
@dataclass(frozen=True)
class Merging(EvictRule):
    """Order entries by another rule, and merge what a prune drops.

    Args:
        base (str): The rule, with an option if any. Default: ``"retention"``.
        threshold (float): Least cosine of two keys whose values merge. Default: ``0.6``.
        share (float): Entries that are merged, best first, for each that stays. Default: ``1``.
    """

    base: str = "retention"
    threshold: float = 0.6
    share: float = 1.0
    merges = True
    rule: ClassVar[EvictRule]  # that of `base`

    def __post_init__(self):
        object.__setattr__(self, "rule", make_rule("evict", self.base))
        if self.rule.merges:
            raise ValueError("[SparseConfig] 'evict' 'ems': option 'base' must be another rule.")
        if self.rule.by_head:
            raise ValueError(
                "[SparseConfig] 'evict' 'ems': option 'base' must be a rule whose entries the heads "
                "share. Leave by_head out."
            )
        if not 0 <= self.share < math.inf:
            raise ValueError(
                f"[SparseConfig] 'evict' 'ems': option 'share' must be a number of at least 0 but got {self.share}."
            )

    def bind(self, layer, indexer=None, backend="auto", selecting=None, observes=0):
        own = layer, indexer, backend
        bound = Rule.bind(self, *own)
        return bound._with(selecting=selecting, rule=self.rule.bind(*own, selecting, observes))

    def without_head(self):
        return replace(self, base="keydiff")

    # What the other rule says.

    observes = property(lambda self: self.rule.observes)
    is_final = property(lambda self: self.rule.is_final)
    every_step = property(lambda self: self.rule.every_step)
    wants_head = property(lambda self: self.rule.wants_head)
    wants_indexer = property(lambda self: self.rule.wants_indexer)
    credits = property(lambda self: self.rule.credits)
    keeps_score = property(lambda self: self.rule.keeps_score)

    def score(self, x, offset):
        return self.rule.score(x, offset)

    def project(self, x, offset):
        return self.rule.project(x, offset)

    def observed(self, x, offset):
        return self.rule.observed(x, offset)

    def credit(self, cache, queries):
        return self.rule.credit(cache, queries)

    def worth(self, cache):
        return self.rule.worth(cache)

    def step_worth(self, x, cache):
        return self.rule.step_worth(x, cache)

    def shares(self, worth):
        return self.rule.shares(worth)

    # What it adds.

    def merged(self, cache, slots, worth):
        B, T = cache.positions.shape
        n = slots.shape[1]
        slots = mx.broadcast_to(slots, (B, n))
        stays = mx.put_along_axis(mx.zeros((B, T), mx.bool_), slots, mx.array(True), axis=1)
        order = mx.arange(T, dtype=mx.float32)[None] if worth is None else worth
        n_merged = min(T - n, round(n * self.share))
        goes = mx.zeros((B, 0), mx.int32)
        if n_merged:
            others = mx.where(stays, -mx.inf, order)
            goes = select_kept(others, T, n_merged, 0, 0, self.backend)
        weights = self.shares(order)
        weights = mx.ones((B, T)) if weights is None else mx.maximum(weights, 1e-20)
        values = [
            self._merge_head(cache.keys[:, h], cache.values[:, h], slots, goes, weights)
            for h in range(cache.keys.shape[1])
        ]
        return mx.stack(values, axis=1)

    def _merge_head(self, keys, values, slots, goes, weights) -> mx.array:
        """Return the values of what stays ``[B, n, D]``, of one head."""

        def rows(x, at):
            return mx.take_along_axis(x, at[..., None], axis=1).astype(mx.float32)

        own = mx.take_along_axis(weights, slots, axis=1)[..., None]
        before = rows(values, slots)
        sums, mass = own * before, own
        centres = _normalised(rows(keys, slots)).swapaxes(1, 2)
        step = max(1, _BLOCK // (slots.shape[0] * slots.shape[1]))
        for start in range(0, goes.shape[1], step):
            at = goes[:, start : start + step]
            alike = _normalised(rows(keys, at)) @ centres
            nearest = alike.argmax(axis=-1, keepdims=True) == mx.arange(slots.shape[1])
            part = nearest & (alike >= self.threshold)
            part = mx.where(part, mx.take_along_axis(weights, at, axis=1)[..., None], 0)
            part = part.swapaxes(1, 2)
            sums, mass = sums + part @ rows(values, at), mass + part.sum(axis=-1, keepdims=True)
        return mx.where(mass > own, sums / mass, before).astype(values.dtype)


def _normalised(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-12)
