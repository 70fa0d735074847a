"""The operations of ``reference`` by kernels, on a GPU that Metal or CUDA runs."""

from __future__ import annotations

import mlx.core as mx

from .kernel import launch
from .levels import SAMPLED, score_levels

# Thread groups that keep a GPU busy, threads of a selection, bytes of shared memory.
_BUSY = {"metal": 128, "cuda": 528}
_SELECT_THREADS = 512
_SHARED_BYTES = {"metal": 32 << 10, "cuda": 48 << 10}
_WARPS = 4  # of a thread group that scores
_CHUNK = 16  # queries that it takes at a time, where they fit
# Elements after a row in shared memory, so that 8 rows lie in different banks.
_PAD = {"metal": 4, "cuda": 8}
_VECTOR_BYTES = 16
_ATTEND_WARPS = 4


def score_gap(language: str, queries: mx.array, tiles: bool) -> str | None:
    """Say why the score kernel can't run on index queries, if it can't.

    Args:
        language (str): ``"metal"`` or ``"cuda"``.
        queries (mx.array): ``[B, Hi, L, Di]``.
        tiles (bool): Whether tiles of queries share a row.

    Returns:
        str or None: The reason, short.
    """
    if language == "cuda" and queries.dtype == mx.float32:
        return "the CUDA kernel scores bfloat16 and float16, not float32"
    if queries.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        return f"index queries must be floats but are {queries.dtype}"
    if _score_sizes(language, queries, tiles) is None:
        heads, dims = queries.shape[1], queries.shape[3]
        return f"{heads} index heads of {dims} dims take more memory than a group has"
    return None


def are_many(L: int, tiles: bool) -> bool:
    """Return whether a score kernel meets queries of a prompt, not of steps of decode.

    Args:
        L (int): Queries.
        tiles (bool): Whether tiles of queries share a row.
    """
    return tiles or L > _CHUNK


def _score_sizes(language: str, queries: mx.array, tiles: bool) -> dict | None:
    """Choose the sizes that a score kernel is compiled for."""
    n_heads, L, dims = queries.shape[1:]
    step = 16 if language == "cuda" else 8
    depth = -(-dims // step) * step
    # Keys stay in registers: fewer for wide heads, and for a few queries (decode),
    # which can't keep the GPU busy otherwise.
    blocks = max(1, min(4, 320 // depth)) if are_many(L, tiles) else 1
    if depth > 512:
        return None
    for chunk in (_CHUNK, 8) if language == "cuda" else (8,):
        width = depth + _PAD[language]
        # With each row lies a weight; on CUDA both are there twice, rows in 16 bits.
        row_bytes = 2 * (2 * width + 4) if language == "cuda" else 4 * width + 4
        # Beside the heads' weights lie the queries' levels.
        if chunk * (n_heads * row_bytes + 8) <= _SHARED_BYTES[language]:
            return {
                **{"HEADS": n_heads, "DIMS": dims, "DEPTH": depth},
                **{"CHUNK": chunk, "BLOCKS": blocks, "WARPS": _WARPS, "PAD": _PAD[language]},
            }
    return None


def index_scores(language: str, queries: mx.array, weights: mx.array, keys: mx.array) -> mx.array:
    """Score every key for every query: see :func:`reference.index_scores`."""
    B, _, L, _ = queries.shape
    return _score(language, queries, weights, keys, False, (B, L, keys.shape[2]))


def tile_scores(
    language: str,
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    tile_size: int,
    n_open: int,
) -> mx.array:
    """Score every key for tiles of queries: see :func:`reference.tile_scores`."""
    B, _, L, _ = queries.shape
    sampled = mx.zeros((B, L, 0))
    if keys.shape[2] > SAMPLED.start:
        sampled = index_scores(language, queries, weights, keys[:, :, SAMPLED])
    levels = score_levels(sampled, tile_size, n_open)
    weights = mx.concatenate([weights, -levels[..., None]], axis=-1)
    shape = (B, L // tile_size, keys.shape[2])
    return _score(language, queries, weights, keys, True, shape)


def _score(language, queries, weights, keys, tiles, shape):
    B, n_rows, n_keys = shape
    sizes = _score_sizes(language, queries, tiles)
    assert sizes is not None  # else score_gap says so
    block, n_parts = 8, n_rows if tiles else -(-n_rows // sizes["CHUNK"])
    if language == "cuda":
        block = 16
        queries, weights = _lay_out(queries, weights, n_rows if tiles else None, sizes)
    elif tiles:
        weights = weights.reshape(B, n_rows, -1, weights.shape[-1])
    n_groups = -(-n_keys // (block * sizes["BLOCKS"] * _WARPS))
    # Where there are few keys, the queries are split too.
    n_splits = min(n_parts, -(-_BUSY[language] // n_groups))
    return launch(
        "score",
        language,
        [
            mx.contiguous(queries),
            mx.contiguous(weights.astype(mx.float32)),
            keys.astype(queries.dtype),
        ],
        {"T": queries.dtype, "TILES": tiles, **sizes},
        (n_groups, n_splits, B),
        32 * _WARPS,
        [shape],
        [mx.float32],
    )[0]


def _lay_out(queries, weights, n_tiles, sizes) -> tuple[mx.array, mx.array]:
    """Lay queries and weights out as the CUDA kernel copies them: see ``score.cu``."""
    L, chunk = queries.shape[2], sizes["CHUNK"]
    if n_tiles is None:
        queries = _in_chunks(queries, L, chunk).swapaxes(1, 2)  # each for itself
    else:
        size = L // n_tiles
        queries = _in_chunks(queries, size, chunk)
        weights = _in_chunks(weights[:, None], size, chunk)
        weights = weights.reshape(weights.shape[0], -1, weights.shape[-1])
    padding = sizes["DEPTH"] + sizes["PAD"] - sizes["DIMS"]
    return mx.pad(queries, [(0, 0)] * 5 + [(0, padding)]), weights


def _in_chunks(x, size, chunk) -> mx.array:
    """Cut ``[B, H, L, D]`` into tiles of ``size`` and these into chunks.

    Where a tile does not fill its last chunk, its last query stands there again:
    that changes no maximum. Returns ``[B, tiles, chunks, H, chunk, D]``.
    """
    B, n_heads, _, dims = x.shape
    x = x.reshape(B, n_heads, -1, size, dims)
    if size % chunk:
        x = mx.pad(x, [(0, 0)] * 3 + [(0, -size % chunk), (0, 0)], mode="edge")
    x = x.reshape(B, n_heads, x.shape[2], -1, chunk, dims)
    return x.transpose(0, 2, 3, 1, 4, 5)


def select_topk(
    language: str,
    scores: mx.array,
    top_k: int,
    n_visible: mx.array,
    n_sink: int,
    n_recent: int,
) -> mx.array:
    """Select the best keys of each row: see :func:`reference.select_topk`."""
    B, n_rows, _ = scores.shape
    limits = mx.array([top_k, n_sink, n_recent], mx.int32)
    return launch(
        "select",
        language,
        [mx.contiguous(scores), mx.contiguous(n_visible.astype(mx.int32)), limits],
        {"THREADS": _SELECT_THREADS},
        (B * n_rows, 1, 1),
        _SELECT_THREADS,
        [(B, n_rows, top_k)],
        [mx.int32],
    )[0]


def gather_gap(keys: mx.array) -> str | None:
    """Say why the kernel can't gather rows of a cache, if it can't.

    Args:
        keys (mx.array): ``[B, Hkv, T, D]``.

    Returns:
        str or None: The reason, short.
    """
    row_bytes = keys.shape[3] * keys.dtype.size
    if row_bytes % _VECTOR_BYTES:
        return f"a key takes {row_bytes} bytes, which is no multiple of {_VECTOR_BYTES}"
    return None


def gather_tiles(language: str, keys: mx.array, values: mx.array, slots: mx.array) -> tuple[mx.array, mx.array]:
    """Take whole rows for tiles: see :func:`reference.gather_tiles`."""
    B, n_heads, _, head_dim = keys.shape
    n_tiles, n_rows = slots.shape[1:]
    shape = (B * n_tiles, n_heads, n_rows, head_dim)
    parts = head_dim * keys.dtype.size // _VECTOR_BYTES
    n_threads = 256
    n_groups = -(-B * n_tiles * n_heads * n_rows * parts // n_threads)
    keys, values = launch(
        "gather",
        language,
        [keys, values, mx.contiguous(slots)],
        {"T": keys.dtype, "PARTS": parts, "THREADS": n_threads},
        (n_groups, 1, 1),
        n_threads,
        [shape, shape],
        [keys.dtype, keys.dtype],
    )
    return keys, values


def attends(language: str | None, queries: mx.array) -> bool:
    """Return whether a kernel attends to tiles: else rows are gathered for MLX's own.

    Args:
        language (str, optional): ``"metal"`` or ``"cuda"``.
        queries (mx.array): ``[B, Hq, L, D]``.
    """
    return language == "cuda" and queries.dtype in (mx.float16, mx.bfloat16) and queries.shape[3] in (64, 128)


def tile_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    topk_indices: mx.array,
    scale: float,
) -> mx.array:
    """Attend from tiles on CUDA: see :func:`reference.tile_attention`."""
    B, n_heads, L, head_dim = queries.shape
    n_kv_heads, n_tiles = keys.shape[1], topk_indices.shape[1]
    n_rows = n_heads // n_kv_heads * (L // n_tiles)
    n_threads = 32 * _ATTEND_WARPS
    row_bytes = (head_dim + _PAD["cuda"]) * queries.dtype.size
    return launch(
        "attend",
        "cuda",
        [
            *(queries, keys, values),
            mx.contiguous(topk_indices),
            mx.array([scale], mx.float32),
        ],
        {"T": queries.dtype, "D": head_dim, "WARPS": _ATTEND_WARPS, "PAD": _PAD["cuda"]},
        (-(-n_rows // n_threads), n_kv_heads, B * n_tiles),
        n_threads,
        [queries.shape],
        [queries.dtype],
        # A row a thread, and two blocks of 64 keys and values.
        shared_bytes=(n_threads + 4 * 64) * row_bytes,
    )[0]
