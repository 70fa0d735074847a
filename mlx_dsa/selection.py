"""From scores to slots: which keys a query reads, which entry a cache drops.

Pure functions. They take the slots of a cache in the order of their positions
(oldest first) unless they are given the positions. On equal scores the newer
key wins, so that the result is one set on every device and in every run.
"""

from __future__ import annotations

import functools
import operator

import mlx.core as mx

from . import ops
from .ops.reference import order_keys


def select_topk(
    scores: mx.array,
    top_k: int,
    n_visible: mx.array,
    n_sink: int,
    n_recent: int,
    backend: str = "auto",
) -> mx.array:
    """Select the best-scored visible keys, sinks and newest keys always included.

    Args:
        scores (mx.array): ``[B, R, T]`` in float32, unmasked.
        top_k (int): Keys a row, the forced ones included.
        n_visible (mx.array): Keys that each row sees (its first ones) ``[R]``.
        n_sink (int): First keys, always selected.
        n_recent (int): Last visible keys, always selected.
        backend (str): Kernels to use. Default: ``"auto"``.

    Returns:
        mx.array: Slots ``[B, R, top_k]``, int32, ascending, ``-1`` for what a row
        with fewer visible keys leaves empty (these come first).
    """
    return ops.select_topk(scores, top_k, n_visible, n_sink, n_recent, backend)


def forced_slots(n_visible: mx.array, end: int, n_sink: int, n_recent: int) -> mx.array:
    """Return sinks and newest keys of rows.

    Args:
        n_visible (mx.array): Keys that each row sees ``[R]``.
        end (int): Keys there are.
        n_sink, n_recent (int): How many first and newest ones.

    Returns:
        mx.array: Slots ``[R, n]``, int32, in no order, each once; empty ones are ``-1``.
    """
    n_visible = n_visible.astype(mx.int32)[:, None]
    n_sink, n_recent = min(n_sink, end), min(n_recent, end)
    sinks = mx.arange(n_sink, dtype=mx.int32)
    newest = n_visible - n_recent + mx.arange(n_recent, dtype=mx.int32)
    sinks, newest = mx.where(sinks < n_visible, sinks, -1), mx.where(newest < n_sink, -1, newest)
    return mx.concatenate([sinks, newest], axis=-1)


def leave_out(slots: mx.array, wanted: mx.array, n_visible: mx.array, n_sink: int, n_recent: int) -> mx.array:
    """Empty slots that are not wanted, but for sinks and newest keys.

    Args:
        slots (mx.array): ``[B, R, K]``, int32.
        wanted (mx.array): Which of them are ``[B, R, K]``.
        n_visible, n_sink, n_recent: As in :func:`select_topk`.

    Returns:
        mx.array: ``[B, R, K]``, ascending, what is empty (``-1``) first.
    """
    forced = (slots < n_sink) | (slots >= n_visible[:, None] - n_recent)
    return mx.sort(mx.where(wanted | forced, slots, -1), axis=-1)


def select_pages(
    bounds: mx.array,
    page: int,
    n_entries: int,
    top_k: int,
    n_visible: mx.array,
    n_sink: int,
    n_recent: int,
) -> mx.array:
    """Select the best-scored pages that fit, whole, sinks and newest keys always included.

    Args:
        bounds (mx.array): Scores of pages ``[B, R, n_pages]``, or ``[B, H, R, n_pages]``, in
          float32, unmasked.
        page (int): Entries a page; the last may have fewer.
        n_entries (int): Entries there are.
        top_k, n_visible, n_sink, n_recent: As in :func:`select_topk`.

    Returns:
        mx.array: Slots ``[..., R, top_k]``, int32, ascending, ``-1`` for what no page fits
        in (these come first).
    """
    pages = mx.arange(bounds.shape[-1], dtype=mx.int32)
    n_visible = n_visible.astype(mx.int32)[:, None]
    slots = mx.arange(pages.size * page, dtype=mx.int32)
    visible = slots < mx.minimum(n_visible, n_entries)
    forced = visible & ((slots < n_sink) | (slots >= n_visible - n_recent))
    cost = (visible & ~forced).reshape(-1, pages.size, page).sum(axis=-1)  # [R, n_pages]
    room = top_k - forced.sum(axis=-1, keepdims=True)
    # What a query does not see costs nothing, but stands last.
    keys = order_keys(mx.where(pages * page < n_visible, bounds, -mx.inf), pages)
    order = mx.argsort(keys, axis=-1)[..., ::-1]
    cost = mx.take_along_axis(mx.broadcast_to(cost, bounds.shape), order, axis=-1)
    fits = mx.cumsum(cost, axis=-1) <= room
    chosen = mx.put_along_axis(mx.zeros(bounds.shape, mx.bool_), order, fits, axis=-1)
    return _slots_of((mx.repeat(chosen, page, axis=-1) & visible) | forced, top_k)


def _slots_of(mask: mx.array, top_k: int) -> mx.array:
    """Return the slots that a mask ``[..., T]`` has, at most ``top_k``, after empty ones."""
    slots = mx.broadcast_to(mx.arange(mask.shape[-1], dtype=mx.int32), mask.shape)
    n_before = mx.cumsum(mask.astype(mx.int32), axis=-1)
    places = top_k - 1 + n_before - n_before[..., -1:]
    found = mx.full((*mask.shape[:-1], top_k + 1), -1, mx.int32)
    # One more column takes what is not wanted.
    return mx.put_along_axis(found, mx.where(mask, places, top_k), slots, axis=-1)[..., :top_k]


def select_kept(
    scores: mx.array | None,
    n_entries: int,
    budget: int,
    n_sink: int,
    n_recent: int,
    backend: str = "auto",
) -> mx.array:
    """Select the entries that a cache keeps when it is pruned.

    Args:
        scores (mx.array, optional): Worth of each entry ``[B, T]`` in float32;
          without it the newest stay.
        n_entries (int): Entries there are, ``T``.
        budget (int): Entries to keep, at most ``T``.
        n_sink (int): First entries, always kept.
        n_recent (int): Newest entries, always kept.
        backend (str): Kernels to use. Default: ``"auto"``.

    Returns:
        mx.array: Slots ``[B, budget]`` (``[1, budget]`` without scores), int32,
        ascending.
    """
    if scores is None:
        slots = mx.arange(n_entries, dtype=mx.int32)
        return mx.concatenate([slots[:n_sink], slots[n_entries - budget + n_sink :]])[None]
    n_visible = mx.array([n_entries])
    slots = select_topk(scores[:, None], budget, n_visible, n_sink, n_recent, backend)
    return slots[:, 0]


@mx.compile
def pool_neighbours(scores: mx.array, positions: mx.array, radius: int) -> mx.array:
    """Give each entry the best score among the tokens around it.

    A fact is kept or lost as a whole: the tokens beside a valued one read and
    complete it.

    Args:
        scores (mx.array): ``[B, T]``.
        positions (mx.array): Positions of the entries ``[B, T]``, ascending.
        radius (int): Distance in positions up to which a token counts.

    Returns:
        mx.array: ``[B, T]``.
    """
    B, T = scores.shape
    width = 2 * radius + 1
    far = -radius - 1  # no position is near this one

    def around(x, filler):
        padded = mx.pad(x, [(0, 0), (radius, radius)], constant_values=filler)
        return mx.as_strided(padded, (B, T, width), (T + 2 * radius, 1, 1))

    near = mx.abs(around(positions, far) - positions[..., None]) <= radius
    return mx.where(near, around(scores, -mx.inf), -mx.inf).max(axis=-1)


def keydiff_scores(keys: mx.array) -> mx.array:
    """Score entries by how little their keys are like the others' [1].

    Args:
        keys (mx.array): ``[B, Hkv, T, D]``.

    Returns:
        mx.array: ``[B, T]`` in float32: minus the cosine of each key to the mean of the
        normalised keys of its head, on average over the heads.

    [1] Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
        Inference in Resource-Constrained Environments, 2025.
    """
    # A head at a time: as float32 all keys of a long prompt are twice the cache.
    alike = functools.reduce(operator.add, (_cosines(keys[:, h]) for h in range(keys.shape[1])))
    return -alike / keys.shape[1]


@mx.compile
def _cosines(keys: mx.array) -> mx.array:
    """Return the cosine of each key ``[B, T, D]`` to the mean of the normalised ones."""
    keys = _normalised(keys.astype(mx.float32))
    return (keys * _normalised(keys.mean(axis=1, keepdims=True))).sum(axis=-1)


def _normalised(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-12)


def plan_evicted(
    scores: mx.array | None,
    n_entries: int,
    n_steps: int,
    n_sink: int,
    n_recent: int,
) -> mx.array:
    """Select the entries that the next steps replace, one a step.

    Before each step one more entry is no longer recent, and may go from then on.

    Args:
        scores (mx.array, optional): Worth of each entry ``[B, T]`` in float32, in the
          order of positions; without it the oldest go.
        n_entries (int): Entries there are, ``T``.
        n_steps (int): Steps, at most ``n_recent``.
        n_sink (int): First entries, never selected.
        n_recent (int): The newest entries at each step, the new one counted, neither.

    Returns:
        mx.array: Slots ``[B, n_steps]`` (``[1, n_steps]`` without scores), int32.
    """
    if scores is None:
        return mx.arange(n_sink, n_sink + n_steps, dtype=mx.int32)[None]
    return _plan(scores, n_steps, n_sink, n_entries - n_recent + 1)


@mx.compile
def _plan(scores, n_steps, n_sink, end) -> mx.array:
    slots = mx.arange(scores.shape[1], dtype=mx.int32)
    keys = order_keys(scores, slots)
    now, later = keys[:, n_sink:end], keys[:, end : end + n_steps - 1]
    if now.shape[1] > n_steps:
        now = mx.partition(now, kth=n_steps - 1, axis=-1)[:, :n_steps]
    keys = mx.concatenate([now, later], axis=1)
    steps = mx.arange(n_steps)
    arrivals = mx.concatenate([mx.zeros(now.shape[1], steps.dtype), steps[1:]])
    here = arrivals[:, None] <= steps
    # Of the entries that are worth less than one, a step takes away one if there is
    # any: with n of them come by then, n - step - (steps that found none) are left.
    less = keys[:, None, :] < keys[:, :, None]
    n_come = less.astype(mx.float32) @ here.astype(mx.float32)
    idle = mx.cummax(steps + 1 - n_come, axis=-1, inclusive=False)
    none_left = n_come - steps + mx.maximum(idle, 0) == 0
    # What went before has none below it either, but is worth less.
    lowest = mx.array(-1 << 63, mx.int64)
    evicted = mx.where(none_left & here, keys[:, :, None], lowest).max(axis=1)
    return (evicted & 0xFFFFFFFF).astype(mx.int32)


def lay_last(slots: mx.array, n_entries: int) -> mx.array:
    """Return an order of all slots in which some come last.

    Args:
        slots (mx.array): The slots that come last, in this order ``[B, n]``, int32.
        n_entries (int): Entries there are, ``T``.

    Returns:
        mx.array: ``[B, T]``, int32: the others ascending, then these.
    """
    B, n = slots.shape
    place = mx.broadcast_to(mx.arange(n_entries), (B, n_entries))
    last = mx.broadcast_to(mx.arange(n_entries, n_entries + n), (B, n))
    place = mx.put_along_axis(place, slots, last, axis=1)
    return mx.argsort(place, axis=-1).astype(mx.int32)


def select_evicted(
    scores: mx.array | None,
    positions: mx.array,
    offset: int,
    n_sink: int,
    n_recent: int,
) -> mx.array:
    """Select the one entry that a new token's entry replaces.

    Args:
        scores (mx.array, optional): Worth of each entry ``[B, T]`` in float32;
          without it the oldest goes.
        positions (mx.array): Positions of the entries ``[B, T]``, int32.
        offset (int): Position of the new token.
        n_sink (int): Positions below it are never selected.
        n_recent (int): The newest positions, the new one counted, neither.

    Returns:
        mx.array: One slot a batch row ``[B]``, int32.
    """
    keys = _eviction_keys(scores, positions, mx.array(offset), n_sink, n_recent)
    return mx.argmin(keys, axis=-1).astype(mx.int32)


# The offset is an array, or every step would compile anew.
@mx.compile
def _eviction_keys(scores, positions, offset, n_sink, n_recent):
    candidate = (positions >= n_sink) & (positions <= offset - n_recent)
    keys = positions.astype(mx.int64) if scores is None else order_keys(scores, positions)
    return mx.where(candidate, keys, mx.array((1 << 63) - 1, mx.int64))
