"""Entries by the attention that queries to come are expected to pay them.

Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future
Queries Distribution, 2025; its details as in kvpress 0.5. Deviations: the mean and the covariance
are of the last ``queries`` of the prompt, not of all (each is kept until then); one set a layer,
by the mean over its key heads; what comes after the prompt goes after what came in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .evict_rule import EvictRule
from .rule import Probe, at_least


@register("evict", "expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(EvictRule):
    """Keep what queries that are distributed as the last ones, at the next positions, attend to.

    Args:
        queries (int): Last queries of the prompt that are taken for the distribution.
            Default: ``512``.
        future (int): Positions after the prompt over which their rotation is averaged.
            Default: ``512``.
        covariance (bool): Whether the covariance counts, not the mean alone. Default: ``True``.
        norms (bool): Whether an entry counts by the norm of its value, too. Default: ``True``.
        epsilon (float): What is added before it does. Default: ``0``.
        sinks (int): First positions, whose attention is left out and which stay.
            Default: ``4``.
    """

    queries: int = 512
    future: int = 512
    covariance: bool = True
    norms: bool = True
    epsilon: float = 0.0
    sinks: int = 4
    observes = 1
    is_final = True

    # More than any attention times a norm: what came after the prompt goes last.
    _NEWER = 1e30

    def __post_init__(self):
        least = {"queries": (self.queries, 1), "future": (self.future, 1), "sinks": (self.sinks, 0)}
        at_least("evict", "expected_attention", **least)

    def bind(self, *args, **kwargs):
        return super().bind(*args, **kwargs)._with(observes=self.queries)

    def score(self, x, offset):
        return mx.full(x.shape[:2], self._NEWER)

    def observed(self, x, offset):
        B, L, dim = x.shape
        # Each as if it were the first of a text: position 0 rotates nothing.
        queries = self.layer.project(x.reshape(B * L, 1, dim), 0).queries
        queries = queries.reshape(B, L, *queries.shape[1:2], -1).transpose(0, 2, 1, 3)
        return Probe(queries, mx.ones((B, L, 1), x.dtype))

    def shares(self, worth):
        return worth

    def worth(self, cache):
        queries = cache.observed.queries.astype(mx.float32)
        n_kv_heads = cache.keys.shape[1]
        group = queries.shape[1] // n_kv_heads
        turn = self._mean_turn(cache.number, queries.shape[-1])
        counted = cache.positions >= self.sinks
        total = 0
        for h in range(n_kv_heads):  # in float32 all keys of a long prompt are twice the cache
            keys = cache.keys[:, h].astype(mx.float32)
            paid = 0
            for q in range(h * group, (h + 1) * group):
                logits = self._logits(queries[:, q], keys, turn)
                paid = paid + mx.softmax(mx.where(counted, logits, -mx.inf), axis=-1)
            paid = paid / group
            if self.norms:
                norms = mx.linalg.norm(cache.values[:, h].astype(mx.float32), axis=-1)
                paid = (paid + self.epsilon) * norms
            total = total + paid / n_kv_heads
        return mx.where(counted, total, self._NEWER)

    def _logits(self, queries, keys, turn) -> mx.array:
        """Return the log of the mean of ``exp`` of a head's logits ``[B, T]``.

        They are taken to be normal: the mean, and half the variance.
        """
        mean = queries.mean(axis=1, keepdims=True)
        logits = (keys @ (mean @ turn).swapaxes(1, 2))[..., 0] * self.layer.scale
        if not self.covariance:
            return logits
        apart = (queries - mean) @ turn
        covariance = apart.swapaxes(1, 2) @ apart / queries.shape[1]
        return logits + ((keys @ covariance) * keys).sum(axis=-1) * (self.layer.scale**2 / 2)

    def _mean_turn(self, number: int, head_dim: int) -> mx.array:
        """Return the mean of the rotations at the next positions ``[D, D]``: a row is turned
        by multiplying it with that."""
        rope = self.layer.module.rope
        basis = mx.eye(head_dim)[:, None, None]
        at = mx.broadcast_to(basis, (head_dim, 1, self.future, head_dim))
        turned = rope(at, offset=number).mean(axis=2)[:, 0]
        # Some scalings also stretch what they turn, and the queries have been once.
        return turned / rope(mx.ones((1, 1, 1, head_dim)), offset=0)[0, 0]
