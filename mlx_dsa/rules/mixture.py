"""A window for each key head and layer, which grows with the length by a rule of its own.

Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, 2024.
A head reads the sinks and the newest ``alpha + beta * N`` keys; both numbers are found offline
under a budget (``mlx-dsa calibrate --rule mixture --density D``). Deviations: windows are a key
head's; ``N`` is what a query sees, in place of the prompt's length, so a prompt may be cut into any
calls; a window has ``n_recent`` keys at least and, with the sinks, ``top_k`` at most; windows are
counted in keys, not in blocks of 64. Offline, what a window costs is the attention that it leaves
out, on the mean of sampled queries of any text (the paper: what that does to the loss, by
gradients, on answers of the dense model to long questions); the density is kept to at three lengths
and the cost is their mean, made small by a greedy search (the paper: mixed-integer programs, their
Pareto front, and a validation set).
In tiles heads share a set, and what they share is ``window``'s.

A cache keeps what the widest head reads, and every head gathers ``top_k`` slots, empty ones too:
without attention and caches of a layout a head, which MLX has not, a mixture saves no memory and no
time here. It shows what is selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..checkpoint_file import MIXTURE
from ..registry import register
from .baselines import SelectWindow


def widths(alpha: mx.array, beta: mx.array, n_visible: mx.array, n_recent: int, most: int) -> mx.array:
    """Return how many of the newest keys heads read.

    Args:
        alpha, beta (mx.array): Of windows ``[H]``.
        n_visible (mx.array): Keys that queries see ``[L]``.
        n_recent (int): The least that is read.
        most (int): The most.

    Returns:
        mx.array: ``[H, L]``, int32; more than a query sees where that is few.
    """
    grown = alpha[:, None] + beta[:, None] * n_visible.astype(mx.float32)
    return mx.clip(mx.floor(grown).astype(mx.int32), n_recent, most)


@register("select", MIXTURE)
@dataclass(frozen=True)
class Mixture(SelectWindow):
    """Read the sinks, and of the newest keys as many as each head's own rule says."""

    wants_indexer = True
    fills = False
    reads = MIXTURE
    _alpha: ClassVar[mx.array]  # once bound, [Hkv]
    _beta: ClassVar[mx.array]  # likewise

    def bind(self, layer, indexer=None, backend="auto"):
        bound = super().bind(layer, indexer, backend)
        if indexer is None:
            return bound
        return bound._with(**{f"_{name}": indexer.found[name].astype(mx.float32) for name in ("alpha", "beta")})

    def select(self, probe, cache, top_k, n_visible, end, forced):
        n_sink, n_recent = forced
        n_visible = n_visible.astype(mx.int32)[:, None]
        width = widths(self._alpha, self._beta, n_visible[:, 0], n_recent, top_k - n_sink)[..., None]
        width = mx.minimum(width, n_visible)
        sinks = mx.minimum(n_sink, n_visible - width)
        back = mx.arange(top_k - 1, -1, -1, dtype=mx.int32)  # slots come in the order of the text
        older = mx.where(back < width + sinks, sinks - 1 - (back - width), -1)
        slots = mx.where(back < width, n_visible - 1 - back, older)
        return mx.broadcast_to(slots, (probe.queries.shape[0], *slots.shape))
