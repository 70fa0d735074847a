"""The model's own attention, for rules that look at it."""

from __future__ import annotations

import mlx.core as mx

# Numbers of a block of attention: its rows are made some at a time.
_BLOCK = 1 << 26


def attention_probabilities(queries: mx.array, keys: mx.array, seen: mx.array, scale: float) -> mx.array:
    """Return the mean attention of the heads.

    Args:
        queries (mx.array): ``[B, Hq, L, D]``, rotated.
        keys (mx.array): ``[B, Hkv, T, D]``, rotated.
        seen (mx.array): Which keys each query sees ``[L, T]`` or ``[B, L, T]``.
        scale (float): Factor on the query-key products.

    Returns:
        mx.array: ``[B, L, T]`` in float32.
    """
    B, n_heads, L, _ = queries.shape
    n_kv_heads, T = keys.shape[1:3]
    seen = mx.broadcast_to(seen, (B, L, T))
    rows = max(1, _BLOCK // (B * n_heads * T))
    parts = []
    for start in range(0, L, rows):
        part = slice(start, start + rows)
        total = mx.array(0.0)
        for h in range(n_kv_heads):
            group = n_heads // n_kv_heads
            asked = queries[:, h * group : (h + 1) * group, part].astype(mx.float32) * scale
            logits = asked @ keys[:, h : h + 1].astype(mx.float32).swapaxes(-1, -2)
            logits = mx.where(seen[:, None, part], logits, -mx.inf)
            total = total + mx.softmax(logits, axis=-1).sum(axis=1)
        parts.append(total / n_heads)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def attention_received(
    queries: mx.array,
    keys: mx.array,
    asked_at: mx.array,
    positions: mx.array,
    scale: float,
) -> mx.array:
    """Return what keys are paid by causal queries in all, on the mean of the heads.

    Args:
        queries (mx.array): ``[B, Hq, L, D]``, rotated.
        keys (mx.array): ``[B, Hkv, T, D]``, rotated.
        asked_at (mx.array): Positions of the queries ``[L]``.
        positions (mx.array): Positions of the keys ``[B, T]``, in any order.
        scale (float): Factor on the query-key products.

    Returns:
        mx.array: ``[B, T]`` in float32.
    """
    B, n_heads, L, _ = queries.shape
    rows = max(1, _BLOCK // (B * n_heads * keys.shape[2]))
    total = mx.zeros(positions.shape, mx.float32)
    for start in range(0, L, rows):
        part = slice(start, start + rows)
        seen = positions[:, None] <= asked_at[part, None]
        paid = attention_probabilities(queries[:, :, part], keys, seen, scale)
        total = total + paid.sum(axis=1)
    return total
