"""Which pattern a head has: MInference's offline part (``rules/minference.py``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..checkpoint_file import MINFERENCE
from ..families import Layer
from ..rules import fold_heads, make_rule
from ..rules.attending import attention_probabilities
from ..rules.minference import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH
from ..train.teacher import LayerView
from .finder import Finder, Found

# What a head may have, with the share of its keys that are verticals.
CANDIDATES = (
    (A_SHAPE, 1 / 9),
    (VERTICAL_SLASH, 3 / 83),
    (VERTICAL_SLASH, 2 / 17),
    (VERTICAL_SLASH, 5 / 12),
    (VERTICAL_SLASH, 35 / 36),
    (BLOCK_SPARSE, 0.0),
)
_NAMES = {A_SHAPE: "A-shape", VERTICAL_SLASH: "vertical-slash", BLOCK_SPARSE: "block-sparse"}
_ROWS = 128  # queries of a sequence that are compared


class Patterns(Finder):
    """Take for each key head the candidate that keeps most of the attention of sampled queries."""

    kind = MINFERENCE

    @property
    def shortest(self) -> int:
        """Queries that see no more than ``top_k`` keys tell patterns not apart."""
        return self.config.top_k

    def measure(self, layer: Layer, view: LayerView) -> Found:
        config, L = self.config, view.keys.shape[2]
        rows = mx.array(np.unique(np.linspace(config.top_k, L - 1, _ROWS).round().astype(np.int32)))
        n_visible, forced = mx.arange(1, L + 1), (config.n_sink, config.n_recent)
        queries = fold_heads(view.queries[:, :, rows], layer.n_kv_heads)
        seen = mx.arange(L) <= rows[:, None]
        paid = attention_probabilities(queries, fold_heads(view.keys, layer.n_kv_heads), seen, view.scale)
        rule, kept = make_rule("select", MINFERENCE).bind(layer), []
        for pattern, share in CANDIDATES:
            tried = rule.with_patterns([pattern] * layer.n_kv_heads, [share] * layer.n_kv_heads)
            slots = tried.slots(view.queries, view.keys, config.top_k, n_visible, forced, rows)[0]
            read = mx.take_along_axis(paid, mx.maximum(slots, 0), axis=-1)
            kept.append(mx.where(slots < 0, 0, read).sum(axis=-1).mean(axis=-1))
            mx.eval(kept[-1])
        return {"kept": mx.stack(kept, axis=-1)}

    def conclude(self, sums: Mapping[int, Found]) -> tuple[dict[int, Found], list[str]]:
        found: dict[int, Found] = {}
        counts: Counter[int] = Counter()
        for i, of_layer in sums.items():
            best = [CANDIDATES[i] for i in np.array(of_layer["kept"]).argmax(axis=-1)]
            patterns, shares = [pattern for pattern, _ in best], [share for _, share in best]
            found[i] = {"pattern": mx.array(patterns, mx.int32), "vertical": mx.array(shares)}
            counts.update(patterns)
        told = ", ".join(f"{counts[pattern]} {name}" for pattern, name in _NAMES.items())
        return found, [f"Key heads: {told}."]
