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

    Until :meth:`join` is called, and where the projections are not alike (other bits, an
    adapter) or an array is replaced later, the layer's own modules run. An array that is
    changed in place can't be told from what it was: replace it, or patch again.

    Args:
        attention (nn.Module): A model's own attention, with q_proj, k_proj and v_proj.
    """

    _joined: nn.Module | None
    _of: list[tuple[nn.Module, dict[str, mx.array]]]
    _cuts: list[int]

    def __init__(self, attention: nn.Module):
        self._attention = attention
        self.release()

    def join(self):
        """Join the projections: the layer's own arrays become views of the joined ones.

        They keep their values, and nothing is in memory twice.
        """
        layers = self._layers()
        if _are_alike(layers):
            self._joined = _join(layers)
            self._of = [(layer, layer.parameters()) for layer in layers]
            self._cuts = _cuts([layer.weight for layer in layers])

    def release(self):
        """Let the joined arrays go; the layer's own modules run from now on."""
        self._joined = None
        self._of = []
        self._cuts = []

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
        if self._joined is not None and not self._is_current():
            self.release()
        if self._joined is None:
            return self.apart(x)
        return list(mx.split(self._joined(x), self._cuts, axis=-1))

    def apart(self, x: mx.array) -> list[mx.array]:
        """Project with the layer's own modules: the same as a call, bit for bit theirs."""
        return [layer(x) for layer in self._layers()]

    def _is_current(self) -> bool:
        for layer, (known, arrays) in zip(self._layers(), self._of):
            if layer is not known:
                return False
            for name, array in arrays.items():
                if layer.get(name) is not array:
                    return False
        return True


def _are_alike(layers) -> bool:
    first = layers[0]
    settings = [_settings(layer) for layer in layers]
    return type(first) in _PLAIN and all(s == settings[0] for s in settings)


def _settings(layer):
    names = ("group_size", "bits", "mode")
    arrays = [(name, a.dtype, a.shape[1:]) for name, a in tree_flatten(layer.parameters())]
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
