"""A budget cache as arrays and whole numbers by name, as files and copies hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .late import LateStates
from .numbers import Numbers
from .observed import Observed
from .prompt import PromptPhase

if TYPE_CHECKING:
    from .budget import BudgetKVCache


def pack(cache: BudgetKVCache) -> dict[str, Any]:
    """Return what a copy of a cache needs: arrays, whole numbers and ``None``."""
    observed = cache.observed
    return {
        **{"keys": cache.keys, "values": cache.values, "index_keys": cache.index_keys},
        "scores": cache._fetch(3) if len(cache._buffers or ()) > 3 else None,
        "positions": cache.positions if cache.evicted else None,
        **{"offset": cache.offset, "budget": cache.budget, "prompt": cache.prompt.code},
        **{"in_order": int(cache._sorted), "n_planned": cache.n_planned},
        **cache._numbers.contents,
        "observed_queries": observed and observed.queries,
        "observed_weights": observed and observed.weights,
        "observed_positions": observed and mx.array(observed.positions, mx.int32),
        "late": cache._late.join() if cache.n_late else None,
        "late_slots": mx.stack(cache._late_slots, axis=1) if cache._late_slots else None,
    }


def unpack(cache: BudgetKVCache, contents: Mapping[str, Any]):
    """Fill a cache with what :func:`pack` gave."""
    cache.prompt = PromptPhase.from_code(contents["prompt"], getattr(cache, "prompt", None))
    cache.offset, cache.budget, cache.n_planned = (contents[n] for n in ("offset", "budget", "n_planned"))
    keys, scores = contents["keys"], contents["scores"]
    entries = [keys, contents["values"], contents["index_keys"], *([] if scores is None else [scores])]
    cache._buffers = None if keys is None else entries
    cache._size = 0 if keys is None else keys.shape[2]
    cache._positions, cache._sorted = contents["positions"], bool(contents["in_order"])
    cache._numbers = Numbers()
    cache._numbers.contents = contents
    queries, weights, at = (contents[f"observed_{n}"] for n in ("queries", "weights", "positions"))
    cache.observed = None if queries is None else Observed(queries, weights, tuple(at.tolist()))
    cache._late, late, slots = LateStates(cache.most_late), contents["late"], contents["late_slots"]
    if late is not None:
        cache._late.add(late)
    cache._late_slots = [] if slots is None else [slots[:, i] for i in range(cache.n_late)]
