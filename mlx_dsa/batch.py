"""A layer's attention over the conversations of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .cache import RowsCache

if TYPE_CHECKING:
    from .attention import SparseAttention


def attend_rows(sparse: SparseAttention, x: mx.array, cache: RowsCache) -> mx.array:
    """Run a sparse layer for a batch of conversations.

    A row alone does not know of others: it is read, and where its evictions are not planned
    it decodes, by itself. Budgets whose evictions are planned decode together.

    Args:
        sparse (SparseAttention): The layer.
        x (mx.array): Normalised hidden states ``[B, L, dim]``, padded on the right.
        cache (RowsCache): One cache a row.

    Returns:
        mx.array: ``[B, L, dim]``.
    """
    L = x.shape[1]
    cache.begin()
    together = sparse.config.cache == "budget" and not sparse.by_head and sparse.eviction.plans
    if L == 1 and together and len(cache.rows) > 1:
        most_late = sparse.config.n_recent
        stack = cache.stacked(sparse.make_room, sparse.eviction.project, most_late)
        if stack is not None:
            for row in stack.rows if sparse.limit.is_set else ():
                sparse.limit.check(row, stack.steps + 1)
            queries, keys, values, gate = sparse.layer.project(x, stack.numbers, sparse.joined)
            stack.write(keys, values, x)
            scale = sparse.layer.scale
            attended = mx.fast.scaled_dot_product_attention(
                queries, stack.keys, stack.values, scale=scale, mask=stack.mask
            )
            return sparse.layer.output(attended, gate)
    outputs = []
    for i, (row, n) in enumerate(cache.parts(L)):
        output = sparse.attend(x[i : i + 1, :n], row, n) if n else x[i : i + 1, :0]
        outputs.append(mx.pad(output, [(0, 0), (0, L - n), (0, 0)]) if n < L else output)
    return mx.concatenate(outputs, axis=0)
