"""Which channels of keys matter: Double Sparsity's offline part (``rules/double_sparsity.py``)."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..checkpoint_file import DOUBLE_SPARSITY
from ..families import Layer
from ..train.teacher import LayerView
from .finder import Finder, Found


class Channels(Finder):
    """Order a key head's channels by the mean of ``|q * k|`` of a token's own query and key.

    The sum over the head's query heads; of equal ones the first.
    """

    kind = DOUBLE_SPARSITY

    def measure(self, layer: Layer, view: LayerView) -> Found:
        queries, keys = (a.astype(mx.float32) for a in (view.queries, view.keys))
        B, n_kv_heads, L, D = keys.shape
        queries = queries.reshape(B, n_kv_heads, -1, L, D)
        return {"products": mx.abs(queries * keys[:, :, None]).sum(axis=(0, 2)).mean(axis=1)}

    def conclude(self, sums: Mapping[int, Found]) -> tuple[dict[int, Found], list[str]]:
        found: dict[int, Found] = {}
        shares = []
        for i, of_layer in sums.items():
            products = of_layer["products"]
            order = mx.argsort(-products, axis=-1).astype(mx.int32)
            found[i] = {"channels": order}
            largest = mx.take_along_axis(products, order, axis=-1)[:, : max(1, products.shape[-1] // 16)]
            shares.append(float(largest.sum() / products.sum()))
        mean = sum(shares) / len(shares)
        told = f"A sixteenth of the channels has {mean:.0%} of the products, in the worst layer {min(shares):.0%}."
        return found, [told]
