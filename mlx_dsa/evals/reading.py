"""Read texts once with dense attention, for every policy that reads them so."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..families import family_of
from ..patch import SparsePatch
from .generation import spans
from .wrapping import wrapping


class DenseReading:
    """What an unpatched model made of texts.

    Args:
        model: unpatched.
        ids (mx.array): `[B, L]`.

    Attributes:
        ids (mx.array): the same.
        seconds (float): that it took.
    """

    def __init__(self, model: nn.Module, ids: mx.array) -> None:
        began = perf_counter()
        self.ids = ids
        layers = family_of(model).layers(model)
        inputs: dict[int, list[mx.array]] = {i: [] for i in layers}
        listeners = {i: _Listener(layer.module, inputs[i]) for i, layer in layers.items()}
        caches = make_prompt_cache(model)
        n = ids.shape[1]
        with wrapping(model, listeners):
            for start, stop in spans(n):
                model(ids[:, start:stop], cache=caches)
                mx.eval([c.state for c in caches], [heard[-1] for heard in inputs.values()])
        self._inputs: dict[int, mx.array] = {}
        for i, heard in inputs.items():  # a layer at a time: all twice may be too much
            self._inputs[i] = mx.concatenate(heard, axis=1)
            mx.eval(self._inputs[i])
            heard.clear()
        # mlx-lm's state differs by version.
        self._entries = {i: (caches[i].keys[..., :n, :], caches[i].values[..., :n, :]) for i in layers}
        self._states = {i: c for i, c in enumerate(caches) if i not in layers}
        mx.eval(self._inputs, self._entries)
        self.seconds = perf_counter() - began

    def caches(self, model: nn.Module, patch: SparsePatch | None) -> list[Any]:
        """Return the caches that a policy would have, had it read the texts itself.

        Args:
            model: the same, patched or not.
            patch (SparsePatch): the patch in force; ``None`` for the dense model.
        """
        caches = make_prompt_cache(model)
        layers = patch.layers if patch else {}
        for i, cache in enumerate(caches):
            if i in self._states:  # of a layer without attention
                caches[i] = copy.deepcopy(self._states[i])
            elif i in layers:
                layers[i].take(self._inputs[i], *self._entries[i], cache)
            else:
                cache.update_and_fetch(*self._entries[i])
        mx.eval([c.state for c in caches])
        return caches


class _Listener(nn.Module):
    """Keep what an attention layer is given."""

    def __init__(self, attention: nn.Module, heard: list[mx.array]) -> None:
        super().__init__()
        self.attention = attention
        self._heard = heard

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        self._heard.append(x)
        return self.attention(x, mask, cache)
