"""The frozen model as the teacher: what each layer sees, and where it attends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask

from ..families import Layer, family_of
from ..patch import is_patched

_BLOCK_BYTES = 256 << 20
# Queries of a block see nearly the same keys where they are few beside the length.
_BLOCKS = 8


class LayerView(NamedTuple):
    """What one attention layer works on; all that a head beside it can learn from.

    Args:
        x (mx.array): Normalised hidden state ``[B, L, dim]``, as ``self_attn``
          receives it, in float32.
        queries (mx.array): Rotated queries ``[B, Hq, L, D]``.
        keys (mx.array): Rotated keys ``[B, Hkv, L, D]``.
        scale (float): Factor of the attention logits.
    """

    x: mx.array
    queries: mx.array
    keys: mx.array
    scale: float


def check_model(model: Any):
    """Raise a ValueError unless this is an unpatched model of a family that is known."""
    if is_patched(family_of(model).layers(model)):
        raise ValueError("[train] 'model' must be unpatched but has sparse attention. Call restore() on its patch.")


def layer_views(model: Any, tokens: mx.array, chunk_size: int) -> Iterator[tuple[int, LayerView]]:
    """Run the model densely, layer by layer, in chunks of queries.

    Only one layer's view, its keys and values and the hidden state are held at a
    time, and no intermediate is larger than a chunk of queries over all keys.

    Args:
        model: A model of mlx-lm.
        tokens (mx.array): Token ids ``[B, L]``.
        chunk_size (int): Queries a chunk.

    Yields:
        tuple: Number and view of each layer with attention, in order.
    """
    family = family_of(model)
    layers, caches = family.layers(model), family.make_caches(model)
    h = family.embed(model, tokens)
    for i, block in enumerate(model.layers):
        if i in layers:
            view = _view(layers[i], h)
            mx.eval(view)
            yield i, view
            del view
        if i < max(layers):
            h = _forward(block, h, caches[i], chunk_size)
            caches[i] = None  # its keys and values are of no more use


def attention_target(view: LayerView, rows: mx.array, reduce: Callable[..., mx.array] = mx.mean) -> mx.array:
    """Compute the sum over heads of dense attention, normalised to 1.

    Blocks of rows keep the per-head probabilities under 256 MB.

    Args:
        view (LayerView): The layer.
        rows (mx.array): Query positions ``[B, R]``, int32.
        reduce (callable): What is made of the heads' probabilities; of another than their
          mean, as ``mx.max``, the sum is not 1. Default: ``mx.mean``.

    Returns:
        mx.array: Probabilities ``[B, R, L]`` over the keys, float32; 0 where the
        query does not see the key.
    """
    L, targets = view.keys.shape[2], []
    for part, _ in _over_heads(view, np.array(rows), reduce):
        targets.append(_up_to(L, part))
        mx.eval(targets[-1])
    return mx.concatenate(targets, axis=1)


def future_attention(view: LayerView, rows: np.ndarray, min_distance: int) -> mx.array:
    """Compute the largest attention that later queries pay to each key.

    Blocks of rows keep the per-head probabilities under 256 MB.

    Args:
        view (LayerView): The layer.
        rows (np.ndarray): Positions of the queries that count ``[B, R]``,
          ascending, int32; a position may come twice.
        min_distance (int): Queries at most so many tokens after a key do not
          count for it.

    Returns:
        mx.array: The largest probability ``[B, L]`` over heads and queries,
        float32; 0 for a key that no query comes after.
    """
    B, _, L, _ = view.keys.shape
    largest = mx.zeros((B, L))
    for seen, part in _over_heads(view, rows, mx.max):
        counts = mx.arange(seen.shape[-1]) < part[..., None] - min_distance
        seen = mx.where(counts, seen, 0).max(axis=1)
        largest = mx.maximum(largest, _up_to(L, seen))
        mx.eval(largest)
    return largest


def visible_keys(rows: mx.array, length: int) -> mx.array:
    """Return the causal mask ``[B, R, length]`` (bool) of queries at ``rows`` ``[B, R]``."""
    return mx.arange(length) <= rows[..., None]


def _over_heads(
    view: LayerView, rows: np.ndarray, reduce: Callable[..., mx.array]
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the attention of blocks of queries, reduced over heads, and their positions.

    Args:
        view (LayerView): The layer.
        rows (np.ndarray): Query positions ``[B, R]``, int32. Where they ascend, a block
          has few keys that its first query does not see.
        reduce (callable): As ``mx.max``.

    Yields:
        tuple: ``[B, r, T]``, float32, over the keys up to the last that a query of the
        block sees, and positions ``[B, r]``. To be evaluated before the next.
    """
    B, n_heads, L, _ = view.queries.shape
    block = min(_BLOCK_BYTES // (4 * B * n_heads * L), -(-rows.shape[1] // _BLOCKS))
    block = max(1, block)
    keys = view.keys.astype(mx.float32)
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block]
        end = int(part.max()) + 1
        part = mx.array(part)
        yield reduce(_probabilities(view, keys[:, :, :end], part), axis=1), part


def _up_to(length: int, a: mx.array) -> mx.array:
    """Pad the last axis with zeros."""
    return mx.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, length - a.shape[-1])])


def _probabilities(view: LayerView, keys: mx.array, rows: mx.array) -> mx.array:
    """Return the attention ``[B, Hq, R, T]`` of the queries at ``rows`` to ``keys``."""
    B, n_heads, _, D = view.queries.shape
    n_kv_heads, T, R = keys.shape[1], keys.shape[2], rows.shape[1]
    queries = mx.take_along_axis(view.queries, rows[:, None, :, None], axis=2)
    queries = queries.astype(mx.float32) * view.scale
    queries = queries.reshape(B, n_kv_heads, n_heads // n_kv_heads, R, D)
    unseen = mx.where(visible_keys(rows, T), 0, -mx.inf)[:, None, None]
    # The mask is added inside the product: a pass over the logits less.
    logits = mx.addmm(unseen, queries, keys.swapaxes(-1, -2)[:, :, None])
    return mx.softmax(logits.reshape(B, n_heads, R, T), axis=-1)


def _view(layer: Layer, h: mx.array) -> LayerView:
    x = layer.normalise(h)
    queries, keys, _, _ = layer.project(x)
    return LayerView(x.astype(mx.float32), queries, keys, layer.scale)


def _forward(block: Any, h: mx.array, cache: Any, chunk_size: int) -> mx.array:
    outputs = []
    for start in range(0, h.shape[1], chunk_size):
        chunk = h[:, start : start + chunk_size]
        # A layer without attention keeps a state, and needs no mask.
        mask = create_attention_mask(chunk, cache) if "self_attn" in block else None
        outputs.append(block(chunk, mask, cache))
        # One chunk ahead: the device never waits, and holds what two chunks need.
        mx.async_eval(outputs[-1])
        mx.eval(outputs[-2:-1])
    return mx.concatenate(outputs, axis=1)
