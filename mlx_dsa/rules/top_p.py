"""As many keys as a query needs.

Zhou et al., Full Attention Strikes Back: Transferring Full Attention into Sparse within Hundred
Training Steps (RTPurbo), 2026: a query's keys are as many as have a share p of its scores' softmax.
Deviations: scores are the lightning indexer's, one set a layer, where the paper trains a small
index for the heads that retrieve and gives the others a window; sinks and the newest keys are
always read, and count for p; ``top_k`` is the most. Tiles take ``top_k`` keys: there a set serves
many queries. With a budget, what is kept is read whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..ops.reference import order_keys
from ..registry import register
from ..selection import select_topk
from .lightning import Lightning
from .rule import at_least


@register("select", "top_p")
@dataclass(frozen=True)
class TopP(Lightning):
    """Read the best-scored keys until they have a share of the softmax over all scores.

    Args:
        p (float): The share, above 0 and up to 1. Default: ``0.9``.
        least (int): Keys that are read at least, those always read among them.
          Default: ``1``.
    """

    p: float = 0.9
    least: int = 1
    fills = False
    _read: ClassVar[mx.array]  # once bound: keys and queries, counted

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(
                f"[SparseConfig] 'select' 'top_p': option 'p' must be above 0 and at most 1 but got {self.p!r}."
            )
        at_least("select", "top_p", least=(self.least, 0))

    def check(self, config):
        if self.least > config.top_k:
            raise ValueError(
                f"[SparseConfig] 'select' 'top_p': option 'least' must be at most top_k = "
                f"{config.top_k} but got {self.least}."
            )

    def bind(self, *args, **kwargs):
        nothing = mx.zeros((2,), mx.int64)
        return super().bind(*args, **kwargs)._with(_read=nothing)

    @property
    def mean_read(self) -> float:
        """Keys read a query, of those that have been selected for since the rule was bound."""
        keys, queries = (int(n) for n in self._read)
        return keys / queries if queries else 0.0

    def select(self, probe, cache, top_k, n_visible, end, forced):
        scores = self.scores(probe, cache, n_visible, end)
        n_sink, n_recent = forced
        slots = select_topk(scores, top_k, n_visible, n_sink, n_recent, self.backend)
        slots = self._enough(scores, slots, n_visible, n_sink, n_recent)
        n_queries = slots.shape[0] * slots.shape[1]
        read = self._read + mx.stack([(slots >= 0).sum().astype(mx.int64), mx.array(n_queries)])
        object.__setattr__(self, "_read", read)
        return mx.depends(slots, [read])  # or the count's graph would grow without bound

    def _enough(self, scores, slots, n_visible, n_sink, n_recent) -> mx.array:
        """Empty the slots of selections ``[B, L, K]`` that aren't needed; those come first."""
        if self.p == 1:
            return slots
        n_visible = n_visible[:, None]
        visible = mx.arange(scores.shape[-1]) < n_visible
        total = mx.logsumexp(mx.where(visible, scores, -mx.inf), axis=-1, keepdims=True)
        here = mx.take_along_axis(scores, mx.maximum(slots, 0), axis=-1)
        forced = (slots < n_sink) | (slots >= n_visible - n_recent)
        # The forced first, then the best, and of equal ones the newer.
        order = mx.argsort(order_keys(mx.where(forced, mx.inf, here), slots), axis=-1)[..., ::-1]
        slots, forced, share = (mx.take_along_axis(x, order, axis=-1) for x in (slots, forced, mx.exp(here - total)))
        before = mx.cumsum(mx.where(slots < 0, 0, share), axis=-1, inclusive=False)
        needed = forced | (before < self.p) | (mx.arange(slots.shape[-1]) < self.least)
        return mx.sort(mx.where(needed, slots, -1), axis=-1)
