"""An attention layer's projections of queries, keys and values as one product."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

_NAMES = ("q_proj", "k_proj", "v_proj")
_PLAIN = (nn.Linear, nn.QuantizedLinear)


class JoinedProjections:
    """Project one token at a time: a step's time is that of its operations' number.

    The layer's own arrays become views of the joined ones, with the same values, so
    that nothing is in memory twice. Where they are replaced later, or were never alike
    (other bits, an adapter), the layer's own modules run.

    Args:
        attention (nn.Module): The attention of an mlx-lm Qwen3 layer.
    """

    def __init__(self, attention: nn.Module):
        self._attention = attention
        layers = self._layers()
        self._joined = _join(layers) if _are_alike(layers) else None
        self._of = [(layer, layer.get("weight")) for layer in layers]
        self._cuts: list[int] = []
        if self._joined is not None:
            self._cuts = _cuts([weight for _, weight in self._of])

    def _layers(self) -> list[nn.Module]:
        return [self._attention[name] for name in _NAMES]

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Project hidden states.

        Args:
            x (mx.array): ``[B, L, dim]``.

        Returns:
            list of mx.array: Queries, keys and values ``[B, L, heads * D]``, to rounding
            what the layer's own projections return.
        """
        layers = self._layers()
        same = self._joined is not None and all(
            now is was and now.get("weight") is weight
            for now, (was, weight) in zip(layers, self._of)
        )
        if not same:
            return [layer(x) for layer in layers]
        return mx.split(self._joined(x), self._cuts, axis=-1)


def _are_alike(layers) -> bool:
    first = layers[0]
    settings = [_settings(layer) for layer in layers]
    return type(first) in _PLAIN and all(s == settings[0] for s in settings)


def _settings(layer):
    names = ("group_size", "bits", "mode")
    arrays = [
        (name, a.dtype, a.shape[1:]) for name, a in tree_flatten(layer.parameters())
    ]
    return type(layer), [getattr(layer, name, None) for name in names], arrays


def _join(layers) -> nn.Module:
    joined = copy.copy(layers[0])
    for name in layers[0].parameters():
        arrays = [layer[name] for layer in layers]
        joined[name] = mx.concatenate(arrays)
        for layer, view in zip(layers, mx.split(joined[name], _cuts(arrays))):
            layer[name] = view
    mx.eval(joined.parameters(), [layer.parameters() for layer in layers])
    return joined


def _cuts(arrays) -> list[int]:
    first, second = (a.shape[0] for a in arrays[:2])
    return [first, first + second]
