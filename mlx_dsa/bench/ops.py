"""Time the operations of sparse prefill one by one: against dense attention, and
against the least time that this device's memory and arithmetic allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx

from ..machine import on_cpu
from ..ops import gather_tiles, reference, select_topk, tile_attention, tile_scores
from ..ops.reference import tile_slots


@dataclass(frozen=True)
class OpsShape:
    """Give the shapes of one layer's attention and its indexer: Qwen3-8B's.

    Args:
        n_heads (int): Query heads. Default: ``32``.
        n_kv_heads (int): Key heads. Default: ``8``.
        head_dim (int): Dims of a head. Default: ``128``.
        index_n_heads (int): Index heads. Default: ``6``.
        index_head_dim (int): Dims of an index head. Default: ``69``.
        dtype (mx.Dtype): Of all arrays. Default: ``bfloat16``.
    """

    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    index_n_heads: int = 6
    index_head_dim: int = 69
    dtype: mx.Dtype = mx.bfloat16


class Rates(NamedTuple):
    """What a device reaches: bytes a second, and operations a second of a matmul."""

    bandwidth: float
    arithmetic: float


class _Layer(NamedTuple):
    queries: mx.array
    keys: mx.array
    values: mx.array
    index_queries: mx.array
    weights: mx.array
    index_keys: mx.array
    scale: float


def measure_rates(dtype: mx.Dtype = mx.bfloat16, size: int | None = None) -> Rates:
    """Measure a large copy (read and written bytes) and a large matrix product.

    Args:
        dtype (mx.Dtype): Of the product. Default: ``bfloat16``.
        size (int, optional): Rows and columns of the product. Default: 8192 on a GPU,
          1024 on a CPU.

    Returns:
        Rates: Medians of 5.
    """
    if size is None:
        size = 1024 if on_cpu() else 8192
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    source = mx.random.normal((max(1 << 26, 8 * size * size),))
    mx.eval(a, b, source)
    calls = {"copy": lambda: [source + 1], "matmul": lambda: [a @ b]}
    mx.eval([call() for call in calls.values()])
    seconds = _median_seconds(calls, 5)
    return Rates(2 * source.nbytes / seconds["copy"], 2 * size**3 / seconds["matmul"])


def measure_ops(
    contexts: Iterable[int],
    shape: OpsShape = OpsShape(),
    rates: Rates | None = None,
    *,
    chunk: int = 2048,
    top_k: int = 2048,
    tile_size: int = 64,
    n_sink: int = 4,
    n_recent: int = 64,
    backend: str = "auto",
    repeats: int = 7,
    n_layers: int = 4,
) -> Iterator[dict[str, Any]]:
    """Time dense and sparse attention of the last chunk of a prompt, on random data.

    Args:
        contexts (iterable of int): Keys after the chunk, each at least ``chunk`` more
          than ``top_k``.
        shape (OpsShape): One layer.
        rates (Rates, optional): What the device reaches, for the floors.
        chunk (int): Queries, a multiple of ``tile_size``. Default: ``2048``.
        top_k (int): Keys a query attends to. Default: ``2048``.
        tile_size (int): Queries that share a selection. Default: ``64``.
        n_sink (int): First keys, always selected. Default: ``4``.
        n_recent (int): Newest keys, always selected. Default: ``64``.
        backend (str): Kernels to use. Default: ``"auto"``.
        repeats (int): Timings of each operation, taken in turns. Default: ``7``.
        n_layers (int): Layers with data of their own, so that nothing stays in a
          cache from one call to the next. Default: ``4``.

    Returns:
        iterator of dict: ``context``, medians in milliseconds a layer (``dense``,
        ``score``, ``select``, ``attend``, and ``sparse``, all three in one go;
        ``gather`` and ``sdpa``, what ``attend`` takes as two steps), ``floor`` (the
        same, least), ``speedup``. What can't run here is ``None``, with the reason
        under ``failed``.

    Raises:
        ValueError: If a context is too short to be sparse.
    """
    forced = n_sink, n_recent
    contexts = list(contexts)
    for context in contexts:
        if context < chunk + top_k:
            raise ValueError(
                f"[measure_ops] 'contexts' must be at least {chunk + top_k} (chunk + top_k) but got {context}."
            )
    for context in contexts:
        layers = [_layer(shape, context, chunk, seed) for seed in range(n_layers)]
        visible = mx.arange(context - chunk, context, tile_size)
        n_open = context - chunk - n_recent

        def score(layer):
            earlier = layer.index_keys[:, :, : context - tile_size]
            return tile_scores(layer.index_queries, layer.weights, earlier, tile_size, n_open, backend)

        def select(scores):
            return select_topk(scores, top_k - tile_size, visible, *forced, backend)

        def attend(layer: _Layer, slots: mx.array) -> mx.array:
            return tile_attention(*layer[:3], slots, layer.scale, backend)

        def gather(layer, slots):
            rows = tile_slots(slots, chunk, context)
            return gather_tiles(layer.keys, layer.values, rows, backend)

        # What each step reads comes from the reference: one that fails stops no other.
        scores = [
            reference.tile_scores(
                x.index_queries,
                x.weights,
                x.index_keys[:, :, :-tile_size],
                tile_size,
                n_open,
            )
            for x in layers
        ]
        slots = [reference.select_topk(s, top_k - tile_size, visible, *forced) for s in scores]
        mx.eval(layers, scores, slots, visible)
        pairs = list(zip(layers, slots))
        calls = {
            "dense": lambda: [_dense(layer) for layer in layers],
            "score": lambda: [score(layer) for layer in layers],
            "select": lambda: [select(s) for s in scores],
            "gather": lambda: [gather(*pair) for pair in pairs],
            "sdpa": _tile_sdpa(layers[0], slots[0], n_layers),
            "attend": lambda: [attend(*pair) for pair in pairs],
            "sparse": lambda: [attend(x, select(score(x))) for x in layers],
        }
        failed = _failures(calls)
        seconds = _median_seconds({n: call for n, call in calls.items() if n not in failed}, repeats)
        row = {"context": context, "backend": backend}
        for name in calls:
            row[name] = 1e3 * seconds[name] / n_layers if name in seconds else None
        if rates is not None:
            row["floor"] = _floors(shape, rates, context, chunk, top_k, tile_size)
        row["speedup"] = None
        if "sparse" in seconds:
            row["speedup"] = seconds["dense"] / seconds["sparse"]
        yield row | ({"failed": failed} if failed else {})


def bench_ops(contexts: Iterable[int], shape: OpsShape, report: Callable[[dict], None], **given: Any) -> dict[str, Any]:
    """Measure the device's rates, then the operations.

    Args:
        contexts (iterable of int): Keys after the chunk.
        shape (OpsShape): One layer.
        report (callable): Takes each row as it is measured.
        given: As for :func:`measure_ops`.

    Returns:
        dict: ``rows``, ``rates`` and ``shape``.
    """
    rates = measure_rates(shape.dtype)
    rows = []
    for row in measure_ops(contexts, shape, rates, **given):
        rows.append(row)
        report(row)
    described = {**vars(shape), "dtype": str(shape.dtype).rpartition(".")[2]}
    return {"rows": rows, "rates": rates._asdict(), "shape": described}


def _failures(calls: dict[str, Callable]) -> dict[str, str]:
    """Return why some calls can't run: a kernel that does not compile, or no memory."""
    failed = {}
    for name, call in calls.items():
        try:
            mx.eval(call())
        except (RuntimeError, ValueError) as error:
            failed[name] = " ".join(str(error).split())[:200]
    return failed


def _tile_sdpa(layer: _Layer, slots: mx.array, n_layers: int) -> Callable:
    """Return MLX's own attention from tiles to rows that have been gathered."""
    n_tiles = slots.shape[1]
    _, n_heads, chunk, head_dim = layer.queries.shape
    keys, values = reference.gather_tiles(layer.keys, layer.values, tile_slots(slots, chunk, layer.keys.shape[2]))
    rows = layer.queries.reshape(n_heads, n_tiles, -1, head_dim).swapaxes(0, 1)
    mx.eval(keys, values)
    tiles = layer._replace(queries=rows, keys=keys, values=values)
    return lambda: [_dense(tiles) for _ in range(n_layers)]


def _dense(layer: _Layer) -> mx.array:
    return mx.fast.scaled_dot_product_attention(*layer[:3], scale=layer.scale, mask="causal")


def _layer(shape: OpsShape, context: int, chunk: int, seed: int) -> _Layer:
    key = mx.random.key(seed)

    def noise(*size):
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.normal(size, key=now).astype(shape.dtype)

    room = context + 256  # a cache has rows to spare
    n_heads, dims = shape.index_n_heads, shape.index_head_dim
    return _Layer(
        noise(1, shape.n_heads, chunk, shape.head_dim),
        noise(1, shape.n_kv_heads, room, shape.head_dim)[:, :, :context],
        noise(1, shape.n_kv_heads, room, shape.head_dim)[:, :, :context],
        noise(1, n_heads, chunk, dims),
        noise(1, chunk, n_heads) * (n_heads * dims) ** -0.5,
        noise(1, 1, room, dims)[:, :, :context],
        shape.head_dim**-0.5,
    )


def _floors(shape, rates, context, chunk, top_k, tile_size) -> dict[str, float]:
    """Return the least milliseconds of each operation: bytes or arithmetic."""
    size = shape.dtype.size
    row = shape.n_kv_heads * shape.head_dim * 2 * size  # a key and its value
    ends = 2 * chunk * shape.n_heads * shape.head_dim * size  # queries and output
    products = 4 * chunk * shape.n_heads * shape.head_dim
    index_dims = shape.index_n_heads * shape.index_head_dim
    tile_bytes = 4 * chunk // tile_size
    # (bytes, operations); a causal chunk sees half of itself.
    work = {
        "dense": (context * row + ends, products * (context - chunk / 2)),
        "score": (
            context * (shape.index_head_dim * size + tile_bytes) + chunk * index_dims * size,
            2 * chunk * index_dims * (context - chunk / 2),
        ),
        "select": ((context + top_k) * tile_bytes, 0),
        "gather": (2 * top_k * chunk // tile_size * row, 0),
        "sdpa": (
            top_k * chunk // tile_size * row + ends,
            products * (top_k - tile_size / 2),
        ),
        "attend": (
            min(context, top_k * chunk // tile_size) * row + ends,
            products * (top_k - tile_size / 2),
        ),
    }
    floors = {
        name: 1e3 * max(n_bytes / rates.bandwidth, n_ops / rates.arithmetic) for name, (n_bytes, n_ops) in work.items()
    }
    return floors | {"sparse": sum(floors[n] for n in ("score", "select", "attend"))}


def _median_seconds(calls: dict[str, Callable[[], list[mx.array]]], repeats: int) -> dict[str, float]:
    """Time each call, in turns; each has run before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            mx.eval(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}
