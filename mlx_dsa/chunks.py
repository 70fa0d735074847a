"""How a prompt is cut into chunks, and a chunk into parts: a dense one and small sparse
ones, or those between the cuts of a stream."""

from __future__ import annotations

from collections.abc import Iterator

from .machine import on_cpu
from .ops.reference import BLOCK_BYTES


def chunk_size() -> int:
    """Return the tokens of a prompt that are read at once: fewer where that takes long."""
    return 512 if on_cpu() else 2048


def cut_chunk(prefill: str, dense_until: int, tile_size: int, sizes: tuple[int, int, int, int]) -> list[int]:
    """Split a chunk of queries: dense up to the first cut, sparse parts between cuts.

    A sparse part is small enough for its scores to stay in bounds, and in "tile" it
    is whole tiles, or one shorter tile at an end of the chunk.

    Args:
        prefill (str): ``"dense"``, ``"exact"`` or ``"tile"``.
        dense_until (int): Keys up to which a query attends to all that it sees.
        tile_size (int): Queries a tile; tiles begin at its multiples.
        sizes (tuple of int): Batch rows, queries, the position of the first, and
          entries in the cache, the chunk's own among them.

    Returns:
        list of int: Places in the chunk, ascending, the last its length.
    """
    B, L, offset, T = sizes
    if prefill == "dense" or T <= dense_until:
        return [L]
    rows = max(1, BLOCK_BYTES // (4 * B * T))
    if prefill == "exact":
        n_dense = max(0, dense_until - (T - L))
        return [*range(n_dense, L, rows), L]
    rows *= tile_size  # a tile's queries share a row of scores
    edges = [0, *range(tile_size - offset % tile_size, L, tile_size), L]
    n_dense = max((e for e in edges if T - L + e <= dense_until), default=0)
    return list(_tile_cuts([e for e in edges if e >= n_dense], tile_size, rows))


def stream_cuts(stream_chunk: int, budget: int, sizes: tuple[int, int, int]) -> list[int]:
    """Find after which queries of a chunk a stream is cut to its budget.

    It is at multiples of ``stream_chunk`` in the text, wherever the chunk begins, where the
    cache holds more than the budget by then.

    Args:
        stream_chunk (int): Tokens of a text between two cuts.
        budget (int): Entries that a cut leaves.
        sizes (tuple of int): Queries, the position of the first, and entries in the cache
          before the chunk.

    Returns:
        list of int: Places in the chunk, ascending, the last at most its length.
    """
    L, offset, size = sizes
    cuts: list[int] = []
    start = 0
    for end in range(stream_chunk - offset % stream_chunk, L + 1, stream_chunk):
        size, start = size + end - start, end
        if size > budget:
            cuts.append(end)
            size = budget
    return cuts


def _tile_cuts(edges: list[int], size: int, rows: int) -> Iterator[int]:
    """Merge neighbouring whole tiles into parts of at most ``rows`` queries."""
    yield edges[0]
    start = edges[0]
    for edge, following in zip(edges[1:], [*edges[2:], None]):
        whole = edge - start
        joins = following is not None and following - edge == size and whole % size == 0 and whole + size <= rows
        if not joins:
            yield edge
            start = edge
