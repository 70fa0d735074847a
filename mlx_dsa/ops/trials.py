"""Small random inputs, through a kernel and through the reference."""

from __future__ import annotations

import mlx.core as mx

from . import gpu, reference


def scores(language: str, n_heads: int, dims: int, n_queries: int, dtype, tiles: bool):
    """Score keys both ways: ``(kernel, reference)``, float32.

    Args:
        language (str): ``"metal"`` or ``"cuda"``.
        n_heads (int): Index heads.
        dims (int): Dims of a head.
        n_queries (int): Queries, a multiple of 16.
        dtype (mx.Dtype): Of the queries and keys.
        tiles (bool): Whether to reduce over tiles of 16 queries.
    """
    queries = _noise(0, (1, n_heads, n_queries, dims), dtype)
    weights = _noise(1, (1, n_queries, n_heads), dtype)
    keys = _noise(2, (1, 1, 333, dims), dtype)
    # The reference rounds products to the dtype, a kernel doesn't.
    wide, wide_weights, wide_keys = (a.astype(mx.float32) for a in (queries, weights, keys))
    if tiles:
        n_open = 250
        return (
            gpu.tile_scores(language, queries, weights, keys, 16, n_open),
            reference.tile_scores(wide, wide_weights, wide_keys, 16, n_open),
        )
    scores = reference.index_scores(wide, wide_weights, wide_keys)
    return gpu.index_scores(language, queries, weights, keys), scores


def selection(language: str):
    """Select keys both ways: ``(kernel, reference)``, int32."""
    # Rounded, so that scores tie.
    rows = mx.round(_noise(3, (1, 3, 3000), mx.float32) * 8) / 8
    arguments = (rows, 500, mx.array([3000, 2901, 400]), 4, 64)
    return gpu.select_topk(language, *arguments), reference.select_topk(*arguments)


def gathering(language: str, head_dim: int, dtype):
    """Gather rows both ways: ``(kernel, reference)``."""
    keys, values, slots = _tiles(head_dim, dtype)
    return (
        mx.stack([*gpu.gather_tiles(language, keys, values, slots)]),
        mx.stack([*reference.gather_tiles(keys, values, slots)]),
    )


def attention(head_dim: int, dtype):
    """Attend from tiles both ways, on CUDA: ``(kernel, reference)``."""
    queries = _noise(7, (1, 8, 64, head_dim), dtype)
    arguments = (queries, *_tiles(head_dim, dtype), head_dim**-0.5)
    return gpu.tile_attention(*arguments), reference.tile_attention(*arguments)


def _tiles(head_dim, dtype):
    keys, values = (_noise(i, (1, 2, 400, head_dim), dtype) for i in (8, 9))
    slots = mx.sort(mx.random.randint(0, 300, (1, 2, 90), key=mx.random.key(10)), axis=-1)
    return keys[:, :, :364], values[:, :, :364], slots


def _noise(seed: int, shape: tuple[int, ...], dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
