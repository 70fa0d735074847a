"""Index scoring and sparse attention in plain MLX operations.

They run on every backend and define what a kernel must compute.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import mlx.core as mx

from ..machine import on_cpu
from .levels import SAMPLED, score_levels

# No intermediate is larger, and so none nears MLX's 2^31 elements.
BLOCK_BYTES = 64 << 20
# What a CPU core has near it: larger blocks of scores and of gathered rows take up to
# twice the time there (measured: see docs/log.md), and more memory than dense.
_CPU_BLOCK_BYTES = 1 << 20
# Gathering a set of keys a query costs more than masking the rest, up to this many
# times top_k (likewise).
_GATHER_FROM = 8
_LOW = 0xFFFFFFFF


def index_scores(queries: mx.array, weights: mx.array, keys: mx.array) -> mx.array:
    """Score every index key for every index query, summed in float32.

    Args:
        queries (mx.array): ``[B, Hi, L, Di]``.
        weights (mx.array): Head weights ``[B, L, Hi]``, the scale in them.
        keys (mx.array): ``[B, 1, T, Di]``.

    Returns:
        mx.array: ``sum_h weights[h] * relu(queries[h] . keys)`` as ``[B, L, T]``
        in float32, unmasked.
    """
    B, _, L, _ = queries.shape
    if L == 1:
        products = (queries[:, :, 0] @ keys[:, 0].swapaxes(-1, -2)).astype(mx.float32)
        return _combine(products, weights.astype(mx.float32).swapaxes(1, 2))
    block = max(1, _block_bytes() // (4 * B * keys.shape[2]))
    parts = []
    for start in range(0, L, block):
        rows = slice(start, start + block)
        parts.append(_sum_heads(queries[:, :, rows], weights[:, rows], keys))
    return _join(parts, axis=1)


def _block_bytes() -> int:
    return min(BLOCK_BYTES, _CPU_BLOCK_BYTES) if on_cpu() else BLOCK_BYTES


def _sum_heads(queries, weights, keys) -> mx.array:
    keys = keys[:, 0].swapaxes(-1, -2)
    weights = weights.astype(mx.float32)
    # A head at a time: one [L, T] product in memory, not Hi of them.
    products = ((queries[:, h] @ keys).astype(mx.float32) for h in range(queries.shape[1]))
    parts = (mx.maximum(product, 0) * weights[..., h, None] for h, product in enumerate(products))
    return functools.reduce(operator.add, parts)


@mx.compile
def _combine(products: mx.array, weights: mx.array) -> mx.array:
    return (mx.maximum(products, 0) * weights).sum(axis=1, keepdims=True)


def tile_scores(
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    tile_size: int,
    n_open: int,
) -> mx.array:
    """Score every index key for tiles of queries: the maximum over each tile.

    Each query's scores count from its own level (:func:`score_levels`), so that a
    query whose scores are all high does not choose for the whole tile.

    Args:
        queries (mx.array): ``[B, Hi, L, Di]``, ``L`` a multiple of the tile.
        weights (mx.array): Head weights ``[B, L, Hi]``.
        keys (mx.array): ``[B, 1, T, Di]``.
        tile_size (int): Queries a tile.
        n_open (int): Keys that the levels of the first tile are read off (its first
          ones); those of each next one off ``tile_size`` more.

    Returns:
        mx.array: ``[B, L / tile_size, T]`` in float32, unmasked.
    """
    B, _, L, _ = queries.shape
    T = keys.shape[2]
    block = max(1, _block_bytes() // (4 * B * T * tile_size)) * tile_size
    best = []
    for start in range(0, L, block):
        rows = slice(start, start + block)
        scores = _sum_heads(queries[:, :, rows], weights[:, rows], keys)
        levels = score_levels(scores[..., SAMPLED], tile_size, n_open + start)
        scores = scores - levels[..., None]
        best.append(scores.reshape(B, -1, tile_size, T).max(axis=2))
    return _join(best, axis=1)


def select_topk(scores: mx.array, top_k: int, n_visible: mx.array, n_sink: int, n_recent: int) -> mx.array:
    """Select the best-scored visible keys, sinks and newest keys always included.

    Args:
        scores (mx.array): ``[B, R, T]`` in float32, unmasked.
        top_k (int): Keys a row, the forced ones included.
        n_visible (mx.array): Keys that each row sees (its first ones) ``[R]``.
        n_sink (int): First keys, always selected.
        n_recent (int): Last visible keys, always selected.

    Returns:
        mx.array: Slots ``[B, R, top_k]``, int32, ascending, ``-1`` for what a row
        with fewer visible keys leaves empty (these come first).
    """
    slots = mx.arange(scores.shape[-1], dtype=mx.int32)
    n_visible = n_visible.astype(mx.int32)[:, None]
    visible = slots < n_visible
    forced = (slots < n_sink) | (slots >= n_visible - n_recent)
    scores = mx.where(forced, mx.inf, scores)
    keys = order_keys(scores, slots)
    # After the mask no invisible key can be taken for a real one: no score is so low.
    keys = mx.where(visible, keys, mx.array(-1 << 63, mx.int64))
    best = _largest(keys, top_k)
    chosen = mx.where(best == (-1 << 63), -1, (best & _LOW).astype(mx.int32))
    return mx.sort(chosen, axis=-1)


def order_keys(scores: mx.array, positions: mx.array) -> mx.array:
    """Pack score and position in one int64 that orders by score, then newness.

    Args:
        scores (mx.array): float32.
        positions (mx.array): int32, of the same shape, or one that broadcasts.

    Returns:
        mx.array: int64.
    """
    bits = (scores + 0.0).view(mx.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    return mx.left_shift(ordered, mx.array(32, mx.int64)) | positions.astype(mx.int64)


def _largest(keys: mx.array, n: int) -> mx.array:
    T = keys.shape[-1]
    if T < n:
        padding = mx.full((*keys.shape[:-1], n - T), -1 << 63, mx.int64)
        return mx.concatenate([padding, keys], axis=-1)
    if T == n:
        return keys
    return mx.partition(keys, kth=T - n, axis=-1)[..., T - n :]


def gather_rows(x: mx.array, slots: mx.array) -> mx.array:
    """Take whole rows of a cache, one set a batch row.

    Args:
        x (mx.array): ``[B, H, T, D]``.
        slots (mx.array): ``[B, N]``, int32.

    Returns:
        mx.array: ``[B, H, N, D]``.
    """
    # Whole rows, with heads put back before them, are several times as fast on a GPU as
    # their elements one by one, and slower on a CPU (docs/log.md).
    if x.shape[0] == 1 and not on_cpu():
        return mx.contiguous(mx.take(x, slots[0], axis=2))
    return mx.take_along_axis(x, slots[:, None, :, None], axis=2)


def write_rows(x: mx.array, rows: mx.array, slots: mx.array, axis: int) -> mx.array:
    """Overwrite rows of a cache, in place where nothing else holds it.

    Args:
        x (mx.array): ``[B, ..., T, ...]`` with ``T`` on ``axis``.
        rows (mx.array): The same, with ``N`` on ``axis``.
        slots (mx.array): Where each goes ``[B, N]``, int32.
        axis (int): The axis of the slots.

    Returns:
        mx.array: The changed ``x``.
    """
    B, N = slots.shape
    if B == 1 and N == 1:
        return mx.slice_update(x, rows, slots[0], axes=[axis])
    shape = [B] + [1] * (x.ndim - 1)
    shape[axis] = N
    at = mx.broadcast_to(slots.reshape(shape), rows.shape)
    return mx.put_along_axis(x, at, rows, axis=axis)


def gather_tiles(keys: mx.array, values: mx.array, slots: mx.array) -> tuple[mx.array, mx.array]:
    """Take whole rows of keys and values for tiles, with tiles as a batch.

    Args:
        keys (mx.array): ``[B, H, T, D]``.
        values (mx.array): ``[B, H, T, D]``.
        slots (mx.array): ``[B, N, M]``, int32.

    Returns:
        tuple: Keys and values ``[B * N, H, M, D]``.
    """
    B, n_heads, _, head_dim = keys.shape
    n_tiles, n_rows = slots.shape[1:]
    shape = (B, n_heads, n_tiles, n_rows, head_dim)
    rows = (gather_rows(x, slots.flatten(1)).reshape(shape) for x in (keys, values))
    keys, values = (x.swapaxes(1, 2).flatten(0, 1) for x in rows)
    return keys, values


def sparse_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    topk_indices: mx.array,
    scale: float,
) -> mx.array:
    """Attend from each query to its own keys: see :func:`mlx_dsa.sparse_attention`."""
    T, top_k = keys.shape[2], topk_indices.shape[2]
    B, n_heads, L, head_dim = queries.shape
    if T > _GATHER_FROM * top_k:
        attend = _attend_gathered
        row_bytes = 2 * B * top_k * keys.shape[1] * head_dim * keys.dtype.size
        block = max(1, _block_bytes() // row_bytes)
    else:
        attend = _attend_masked
        block = max(1, BLOCK_BYTES // (4 * B * n_heads * T))
    outputs = []
    for start in range(0, L, block):
        indices = topk_indices[:, start : start + block]
        rows = queries[:, :, start : start + block]
        output = attend(rows, keys, values, indices, scale)
        some = (indices >= 0).any(axis=-1)[:, None, :, None]
        outputs.append(mx.where(some, output, 0))
    return _join(outputs, axis=2)


def _attend_masked(queries, keys, values, indices, scale):
    B, L, _ = indices.shape
    T = keys.shape[2]
    # One more column takes what is empty.
    mask = mx.zeros((B, L, T + 1), mx.bool_)
    mask = mx.put_along_axis(mask, mx.where(indices < 0, T, indices), mx.array(True), axis=-1)[:, None, :, :T]
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _attend_gathered(queries, keys, values, indices, scale):
    B, n_heads, L, head_dim = queries.shape
    n_kv_heads, top_k = keys.shape[1], indices.shape[2]
    slots = mx.maximum(indices, 0).reshape(B, L * top_k)
    # Each query becomes a batch row of one query over its own keys.
    gathered = [
        gather_rows(x, slots).reshape(B, n_kv_heads, L, top_k, head_dim).swapaxes(1, 2).flatten(0, 1)
        for x in (keys, values)
    ]
    output = mx.fast.scaled_dot_product_attention(
        queries.swapaxes(1, 2).reshape(B * L, n_heads, 1, head_dim),
        *gathered,
        scale=scale,
        mask=(indices >= 0).reshape(B * L, 1, 1, top_k),
    )
    return output.reshape(B, L, n_heads, head_dim).swapaxes(1, 2)


def tile_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    topk_indices: mx.array,
    scale: float,
    gather: Callable = gather_tiles,
    fills: bool = True,
) -> mx.array:
    """Attend from tiles of queries to shared earlier keys and their own tile.

    Args:
        queries (mx.array): ``[B, Hq, L, D]``, ``L`` a multiple of the number of
          tiles.
        keys (mx.array): ``[B, Hkv, T, D]``; the last ``L`` are the queries' own.
        values (mx.array): ``[B, Hkv, T, D]``.
        topk_indices (mx.array): Slots of each tile's earlier keys
          ``[B, n_tiles, K]``, int32, none empty unless ``fills`` is false.
        scale (float): Factor on the query-key products.
        gather (callable): What takes the rows. Default: :func:`gather_tiles`.
        fills (bool): Whether no slot is empty. Default: ``True``.

    Returns:
        mx.array: ``[B, Hq, L, D]``.
    """
    B, n_heads, L, head_dim = queries.shape
    slots = tile_slots(topk_indices, L, keys.shape[2])
    n_tiles, n_rows = slots.shape[1:]
    tile_size = L // n_tiles
    row_bytes = 2 * B * n_rows * keys.shape[1] * head_dim * keys.dtype.size
    block = max(1, _block_bytes() // row_bytes)
    outputs = []
    for start in range(0, n_tiles, block):
        part = slots[:, start : start + block]
        n = part.shape[1]
        # The own tile comes last, so the lower-right causal mask is the right one.
        mask = "causal" if fills else _tile_mask(part, tile_size)
        tiles = gather(keys, values, part if fills else mx.maximum(part, 0))
        rows = queries[:, :, start * tile_size : (start + n) * tile_size]
        rows = rows.reshape(B, n_heads, n, tile_size, head_dim)
        output = mx.fast.scaled_dot_product_attention(rows.swapaxes(1, 2).flatten(0, 1), *tiles, scale=scale, mask=mask)
        output = output.reshape(B, n, n_heads, tile_size, head_dim).swapaxes(1, 2)
        outputs.append(output.reshape(B, n_heads, n * tile_size, head_dim))
    return _join(outputs, axis=2)


def _tile_mask(slots, tile_size):
    """Return what queries of tiles see of their slots ``[B * n, 1, tile_size, K + tile_size]``."""
    B, n, n_rows = slots.shape
    there = mx.broadcast_to((slots >= 0)[:, :, None], (B, n, tile_size, n_rows))
    causal = mx.tri(tile_size, n_rows, n_rows - tile_size, dtype=mx.bool_)
    return (there & causal).flatten(0, 1)[:, None]


def tile_slots(topk_indices: mx.array, L: int, T: int) -> mx.array:
    """Add each tile's own slots after the earlier ones.

    Args:
        topk_indices (mx.array): ``[B, n_tiles, K]``, int32.
        L (int): Queries of all tiles; their slots are the last.
        T (int): Slots there are.

    Returns:
        mx.array: ``[B, n_tiles, K + L / n_tiles]``, int32.
    """
    B, n_tiles = topk_indices.shape[:2]
    own = mx.arange(T - L, T, dtype=mx.int32).reshape(1, n_tiles, L // n_tiles)
    own = mx.broadcast_to(own, (B, *own.shape[1:]))
    return mx.concatenate([topk_indices, own], axis=2)


def _join(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
