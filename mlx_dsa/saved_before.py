"""Caches in files of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from .cache import BudgetKVCache

# The newest has places in place of names. Before that keys that were turned were kept
# unrotated: rotated by 0. And before entries could be numbered anew there were no numbers.
FORMATS = ("mlx-dsa cache 5", "mlx-dsa cache 4", "mlx-dsa cache 3")
_UNROTATED, _UNNUMBERED = FORMATS[1:]
PLACES = ("keys", "values", "index_keys", "offset", "prompt")
BUDGET_PLACES = (*PLACES, "positions", "in_order", "budget", "n_planned")
NUMBERS = ("numbers", "numbered_until", "shift", "first_keys", "first_numbers")
AFTER = ("observed_queries", "observed_weights", "observed_positions", "late", "late_slots", "scores")


def named_contents(kind: str, contents: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return a cache's contents as they are saved now.

    Args:
        kind (str): Its class.
        contents (Mapping): By place, ``"0"`` and so on.
        form (str): One of :data:`FORMATS`.

    Returns:
        dict: By name.
    """
    values = [contents[str(i)] for i in range(len(contents))]
    if kind == ArraysCache.__name__:
        return dict(contents)
    if kind == KVCache.__name__:
        return dict(zip(("keys", "values", "offset"), values))
    if kind != BudgetKVCache.__name__:
        return dict(zip(PLACES, values))
    numbers = {_UNNUMBERED: (), _UNROTATED: NUMBERS[:4]}.get(form, NUMBERS)
    blank = {**dict.fromkeys((*NUMBERS, "scores")), "numbered_until": 0, "shift": 0}
    named: dict[str, Any] = blank | dict(zip((*BUDGET_PLACES, *numbers, *AFTER), values))
    if form == _UNROTATED and named["first_keys"] is not None:
        named["first_numbers"] = mx.zeros(named["numbers"].shape, mx.int32)
    return named
