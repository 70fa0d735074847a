"""What a model's layers have kept of a text, and what an answer reads of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cache import SparseKVCache
from ..families import Layer, family_of
from ..rules import fold_heads
from ..rules.attending import attention_probabilities


def kept_tokens(model: nn.Module, caches: Sequence[Any], n_tokens: int) -> tuple[list[int], list[str]]:
    """Return which tokens of a text each layer with attention has.

    Args:
        model (nn.Module): From mlx-lm.
        caches (Sequence): One cache a layer, which have read the text.
        n_tokens (int): Tokens of the text.

    Returns:
        tuple: The layers' numbers, and for each a bit a token, the first in the highest bit of
        the first byte, in base64.
    """
    layers = sorted(family_of(model).layers(model))
    kept = []
    for i in layers:
        is_kept = np.zeros(n_tokens, bool)
        positions = np.array(_positions(caches[i])).ravel()  # where heads keep their own: of any
        is_kept[positions[positions < n_tokens]] = True
        kept.append(base64.b64encode(np.packbits(is_kept).tobytes()).decode())
    return layers, kept


class Looks:
    """Sum up what attention the tokens of an answer pay to those of a text.

    The layers' own queries are compared with the keys in their caches, which costs about as much
    again as the layers' attention. Only the thread that runs the model may use it.

    Args:
        model (nn.Module): From mlx-lm.
        caches (Sequence): One cache a layer, which have read the text and are nobody else's.
        n_tokens (int): Tokens of the text.
    """

    def __init__(self, model: nn.Module, caches: Sequence[Any], n_tokens: int):
        self._model = model
        self._caches = caches
        self._layers = family_of(model).layers(model)
        self._n_tokens = n_tokens
        self._total = mx.zeros(n_tokens + 1)
        self._n = 0

    def read(self, tokens: Sequence[int], looking: bool):
        """Read what comes after the text.

        Args:
            tokens (sequence of int): Some tokens.
            looking (bool): Whether their attention counts.
        """
        with self._spying() if looking else _nothing():
            self._model(mx.array([list(tokens)]), cache=self._caches)
        # To read the states says that a prompt goes on, and nothing is dropped.
        mx.eval(self._total, [cache.state for cache in self._caches])
        self._n += len(tokens) if looking else 0

    def shares(self) -> np.ndarray:
        """Return for each token of the text its share of the attention, on the mean of tokens,
        heads and layers."""
        return np.array(self._total[: self._n_tokens]) / max(1, self._n * len(self._layers))

    @contextmanager
    def _spying(self) -> Iterator[None]:
        before = {i: layer.current for i, layer in self._layers.items()}
        try:
            for layer in self._layers.values():
                layer.put(_Spy(layer, self._note))
            yield
        finally:
            for i, layer in self._layers.items():
                layer.put(before[i])

    def _note(self, layer: Layer, x: mx.array, cache: Any):
        keys, positions = _keys(cache), _positions(cache)
        queries = layer.project(x, getattr(cache, "number", cache.offset)).queries
        if keys.shape[0] > 1:  # each key head has entries of its own
            queries = fold_heads(queries, keys.shape[0])
        seen = mx.ones((queries.shape[2], keys.shape[2]), mx.bool_)
        paid = attention_probabilities(queries, keys, seen, layer.scale).sum(axis=1)
        at = mx.minimum(positions, self._n_tokens)  # what is not of the text comes last
        self._total = self._total.at[at.reshape(-1)].add(paid.reshape(-1) / keys.shape[0])


class _Spy(nn.Module):
    """Stand before an attention, and tell what it is given."""

    def __init__(self, layer: Layer, tell: Callable[[Layer, mx.array, Any], None]):
        super().__init__()
        self.inner = layer.current
        self._about = layer, tell

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        layer, tell = self._about
        tell(layer, x, cache)
        return self.inner(x, mask, cache)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _positions(cache: Any) -> mx.array:
    if isinstance(cache, SparseKVCache):
        positions = cache.positions
        assert positions is not None  # it has read something
        return positions
    return mx.arange(cache.offset, dtype=mx.int32)[None]


def _keys(cache: Any) -> mx.array:
    keys: mx.array = cache.keys
    return keys if isinstance(cache, SparseKVCache) else keys[..., : cache.offset, :]
