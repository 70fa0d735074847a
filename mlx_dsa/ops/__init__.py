"""Index scoring, selection and sparse attention, behind one choice of backend."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import backends, gpu, reference, trials
from .backends import check_backend, choose, crossover
from .reference import gather_rows, write_rows

__all__ = [
    "check_backend",
    "crossover",
    "gather_rows",
    "gather_tiles",
    "index_scores",
    "select_topk",
    "sparse_attention",
    "tile_attention",
    "tile_scores",
    "write_rows",
]


def index_scores(queries: mx.array, weights: mx.array, keys: mx.array, backend: str = "auto") -> mx.array:
    """Score every index key for every query: see :func:`reference.index_scores`.

    Raises:
        ValueError: If the backend can't run here.
    """
    language = _score_language(queries, False, backend)
    if language is None:
        return reference.index_scores(queries, weights, keys)
    return gpu.index_scores(language, queries, weights, keys)


def tile_scores(
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    tile_size: int,
    n_open: int,
    backend: str = "auto",
) -> mx.array:
    """Score every index key for tiles: see :func:`reference.tile_scores`.

    Raises:
        ValueError: If the backend can't run here.
    """
    language = _score_language(queries, True, backend)
    if language is None:
        return reference.tile_scores(queries, weights, keys, tile_size, n_open)
    return gpu.tile_scores(language, queries, weights, keys, tile_size, n_open)


def _score_language(queries, tiles, backend):
    _, n_heads, L, dims = queries.shape
    # A kernel is compiled for a few queries or for many.
    key = (n_heads, dims, 64 if gpu.are_many(L, tiles) else 16, queries.dtype, tiles)
    return choose(
        backend,
        "tile_scores" if tiles else "index_scores",
        lambda language: gpu.score_gap(language, queries, tiles),
        lambda language: trials.scores(language, *key),
        *key,
    )


def select_topk(
    scores: mx.array,
    top_k: int,
    n_visible: mx.array,
    n_sink: int,
    n_recent: int,
    backend: str = "auto",
) -> mx.array:
    """Select the best keys of each row: see :func:`reference.select_topk`.

    Raises:
        ValueError: If the backend can't run here.
    """
    language = choose(backend, "select_topk", lambda language: None, trials.selection)
    if language is None:
        return reference.select_topk(scores, top_k, n_visible, n_sink, n_recent)
    return gpu.select_topk(language, scores, top_k, n_visible, n_sink, n_recent)


def gather_tiles(keys: mx.array, values: mx.array, slots: mx.array, backend: str = "auto") -> tuple[mx.array, mx.array]:
    """Take whole rows for tiles: see :func:`reference.gather_tiles`.

    Raises:
        ValueError: If the backend can't run here.
    """
    key = (keys.shape[3], keys.dtype)
    language = choose(
        backend,
        "gather",
        lambda _: gpu.gather_gap(keys),
        lambda language: trials.gathering(language, *key),
        *key,
    )
    if language is None:
        return reference.gather_tiles(keys, values, slots)
    return gpu.gather_tiles(language, keys, values, slots)


def tile_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    topk_indices: mx.array,
    scale: float,
    backend: str = "auto",
    fills: bool = True,
) -> mx.array:
    """Attend from tiles of queries: see :func:`reference.tile_attention`.

    Where no kernel attends, or slots may be empty (``fills`` false), rows are gathered for
    MLX's own attention.

    Raises:
        ValueError: If the backend can't run here.
    """
    arguments = (queries, keys, values, topk_indices, scale)
    if fills and gpu.attends(backends.device_language(), queries):
        key = (keys.shape[3], keys.dtype)
        language = choose(
            backend,
            "tile_attention",
            lambda _: None,
            lambda _: trials.attention(*key),
            *key,
        )
        if language is not None:
            return gpu.tile_attention(*arguments)
    return reference.tile_attention(*arguments, partial(gather_tiles, backend=backend), fills)


def sparse_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    topk_indices: mx.array,
    *,
    scale: float,
    backend: str = "auto",
) -> mx.array:
    """Attend from each query to its own set of keys.

    Args:
        queries (mx.array): ``[B, Hq, L, D]``.
        keys (mx.array): ``[B, Hkv, T, D]``, ``Hq`` a multiple of ``Hkv``.
        values (mx.array): ``[B, Hkv, T, D]``.
        topk_indices (mx.array): Slots of the keys ``[B, L, K]``, or for each key head its
          own ``[B, Hkv, L, K]``, int32, no slot twice; ``-1`` is empty.
        scale (float): Factor on the query-key products, usually ``D**-0.5``.
        backend (str): Kernels to use. Default: ``"auto"``.

    Returns:
        mx.array: ``[B, Hq, L, D]``, of the dtype of ``queries``; zeros for a
        query with no key.

    Raises:
        ValueError: If the shapes do not fit, or the backend can't run here.
    """
    check_backend(backend)
    _check_shapes(queries, keys, values, topk_indices)
    if topk_indices.ndim == 4:
        heads = (mx.split(x, keys.shape[1], axis=1) for x in (queries, keys, values))
        slots = topk_indices.swapaxes(0, 1)
        outputs = [reference.sparse_attention(q, k, v, s, scale) for q, k, v, s in zip(*heads, slots)]
        return mx.concatenate(outputs, axis=1)
    return reference.sparse_attention(queries, keys, values, topk_indices, scale)


def _check_shapes(queries, keys, values, topk_indices):
    B, n_heads, L, head_dim = _four(queries, "queries")
    n_kv_heads = _four(keys, "keys")[1]
    if values.shape != keys.shape:
        raise ValueError(
            f"[sparse_attention] 'values' must have the shape of keys {keys.shape} but got {values.shape}."
        )
    if keys.shape[0] != B or keys.shape[3] != head_dim or n_heads % n_kv_heads:
        raise ValueError(
            f"[sparse_attention] 'keys' must be [{B}, a divisor of {n_heads}, T, {head_dim}] but got {keys.shape}."
        )
    if topk_indices.shape[:-1] not in ((B, L), (B, n_kv_heads, L)):
        raise ValueError(
            f"[sparse_attention] 'topk_indices' must be [{B}, {L}, K] or "
            f"[{B}, {n_kv_heads}, {L}, K] but got {topk_indices.shape}."
        )
    if not mx.issubdtype(topk_indices.dtype, mx.signedinteger):
        raise ValueError(f"[sparse_attention] 'topk_indices' must be int32 but got {topk_indices.dtype}.")


def _four(array, name):
    if array.ndim != 4:
        raise ValueError(f"[sparse_attention] '{name}' must have 4 axes [B, H, T, D] but got {array.shape}.")
    return array.shape
