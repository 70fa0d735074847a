"""How wide each head's window is: MoA's offline part (``rules/mixture.py``)."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..checkpoint_file import MIXTURE
from ..families import Layer
from ..rules import fold_heads
from ..rules.attending import attention_probabilities
from ..rules.mixture import widths
from ..train.teacher import LayerView
from .config import CalibrateConfig
from .finder import Finder, Found

# Candidates: alpha as a share of top_k, beta as a multiple of the density.
_ALPHAS = (-0.5, -0.25, 0, 0.125, 0.25, 0.5, 1)
_BETAS = (0, 0.5, 1, 2, 4)
_ROWS = 128  # queries of a sequence that are compared


class Windows(Finder):
    """Choose a window for every key head so that little attention is left out under a budget.

    At each of three lengths, from ``top_k`` to a sequence's, the heads of all layers read on
    average at most ``density`` of what there is.

    Raises:
        ValueError: If the density does not reach for what is always read.
    """

    kind = MIXTURE

    def __init__(self, config: CalibrateConfig):
        super().__init__(config)
        least = (config.n_sink + config.n_recent) / config.top_k
        if config.density < least:
            raise ValueError(
                f"[CalibrateConfig] 'density' must be at least (n_sink + n_recent) / top_k = {least:.4f} but got "
                f"{config.density}. Raise it, or lower n_recent."
            )
        pairs = [(a * config.top_k, b * config.density) for a in _ALPHAS for b in _BETAS]
        self.candidates = np.array(pairs, np.float32)
        lengths = np.linspace(config.top_k, config.sequence_length, 3).round().astype(np.int32)
        # What candidates read at these lengths, as shares of what the budget has.
        self.costs = (config.n_sink + self._widths(mx.array(lengths))) / (config.density * lengths)

    @property
    def shortest(self) -> int:
        """Queries that see no more than ``top_k`` keys read all."""
        return self.config.top_k

    def _widths(self, n_visible: mx.array) -> np.ndarray:
        """Return the widths of the candidates ``[C, L]``."""
        alpha, beta = mx.array(self.candidates).T
        config = self.config
        return np.array(widths(alpha, beta, n_visible, config.n_recent, config.top_k - config.n_sink))

    def measure(self, layer: Layer, view: LayerView) -> Found:
        L = view.keys.shape[2]
        rows = mx.array(np.unique(np.linspace(self.config.top_k, L - 1, _ROWS).round().astype(np.int32)))
        seen = mx.arange(L) <= rows[:, None]
        queries = fold_heads(view.queries[:, :, rows], layer.n_kv_heads)
        paid = attention_probabilities(queries, fold_heads(view.keys, layer.n_kv_heads), seen, view.scale)
        # What is paid to the keys before each, and with it to any window.
        before = mx.pad(mx.cumsum(paid, axis=-1), [(0, 0), (0, 0), (1, 0)])
        start = rows + 1 - mx.array(self._widths(rows + 1))
        lost = []
        for places in start:
            sinks = mx.minimum(self.config.n_sink, places)
            ends = (mx.broadcast_to(at[:, None], (*before.shape[:2], 1)) for at in (places, sinks))
            older, kept = (mx.take_along_axis(before, mx.maximum(at, 0), axis=-1)[..., 0] for at in ends)
            lost.append((older - kept).mean(axis=-1))
        return {"lost": mx.stack(lost, axis=-1)}

    def conclude(self, sums: Mapping[int, Found]) -> tuple[dict[int, Found], list[str]]:
        lost = np.concatenate([np.array(of_layer["lost"], np.float64) for of_layer in sums.values()])
        chosen = choose(lost, self.costs)
        n_heads = len(lost) // len(sums)
        found: dict[int, Found] = {}
        for place, i in enumerate(sums):
            alpha, beta = self.candidates[chosen[place * n_heads : (place + 1) * n_heads]].T
            found[i] = {"alpha": mx.array(alpha), "beta": mx.array(beta)}
        used = self.costs[chosen].mean(axis=0) * self.config.density
        growing = int((self.candidates[chosen][:, 1] > 0).sum())
        told = (
            f"Of {len(chosen)} key heads {growing} have windows that grow. Density at {self.config.top_k:,} tokens "
            f"{used[0]:.3f}, at {self.config.sequence_length:,} {used[-1]:.3f}."
        )
        return found, [told]


def choose(lost: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Choose a candidate for each head: greedily, what loses least for what it costs more.

    Args:
        lost (np.ndarray): What heads lose by candidates ``[H, C]``.
        costs (np.ndarray): What a candidate costs at some lengths, where the mean over the heads
          may be 1 ``[C, n]``. One of them must cost no more than that at each.

    Returns:
        np.ndarray: Places of candidates ``[H]``; at no length do they cost more than 1.
    """
    n_heads = len(lost)
    chosen = np.full(n_heads, costs.max(axis=1).argmin())
    while True:
        gain = lost[np.arange(n_heads), chosen][:, None] - lost
        more = costs - costs[chosen][:, None]
        fits = (costs[chosen].sum(axis=0) + more <= n_heads + 1e-9).all(axis=-1)
        worth = np.where(fits & (gain > 1e-9), gain / np.maximum(more.sum(axis=-1), 1e-9), 0)
        head, candidate = np.unravel_index(worth.argmax(), worth.shape)
        if not worth[head, candidate]:
            return chosen
        chosen[head] = candidate
