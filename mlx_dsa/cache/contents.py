"""A budget cache as a list of arrays and whole numbers, as files and copies hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .late import LateStates
from .numbers import Numbers
from .observed import Observed
from .prompt import PromptPhase

if TYPE_CHECKING:
    from .budget import BudgetKVCache


def pack(cache: BudgetKVCache) -> list[Any]:
    """Return what a copy of a cache needs: arrays, whole numbers and ``None``."""
    late: list[Any] = [None, None]
    if cache.n_late:
        late[0] = cache._late.join()
        if cache._late_slots:
            late[1] = mx.stack(cache._late_slots, axis=1)
    window: list[Any] = [None, None, None]
    if cache.observed is not None:
        window = [*cache.observed[:2], mx.array(cache.observed.positions, mx.int32)]
    return [
        *(cache.keys, cache.values, cache.index_keys, cache.offset, cache.prompt.code),
        *(cache.positions if cache.evicted else None, int(cache._sorted)),
        *(cache.budget, cache.n_planned),
        *cache._numbers.contents,
        *window,
        *late,
        *(cache._fetch(i) for i in range(3, len(cache._buffers or ()))),
    ]


def unpack(cache: BudgetKVCache, contents: Sequence[Any]):
    """Fill a cache with what :func:`pack` gave."""
    keys, values, index_keys, cache.offset, prompt, *rest = contents
    cache.prompt = PromptPhase.from_code(prompt, getattr(cache, "prompt", None))
    cache._positions, in_order, cache.budget, cache.n_planned, *rest = rest
    cache._numbers = Numbers()
    cache._numbers.contents, rest = rest[:5], rest[5:]
    *window, late, late_slots = rest[:5]
    cache._late = LateStates(cache.most_late)
    if late is not None:
        cache._late.add(late)
    cache._buffers = None if keys is None else [keys, values, index_keys, *rest[5:]]
    cache._late_slots = []
    if late_slots is not None:
        cache._late_slots = [late_slots[:, i] for i in range(cache.n_late)]
    cache._size = 0 if keys is None else keys.shape[2]
    cache._sorted = bool(in_order)
    queries, weights, at = window
    cache.observed = None if queries is None else Observed(queries, weights, tuple(at.tolist()))
