"""Copies of caches, whatever their kind, and how far they can be taken back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..cache import BudgetKVCache, FullKVCache, SparseKVCache


def copies_of(caches: Sequence[Any]) -> list[Any]:
    """Return caches that go on by themselves from where these are.

    Args:
        caches (Sequence): One cache a layer.
    """
    return [c.copy() if isinstance(c, SparseKVCache) else copy.deepcopy(c) for c in caches]


def hold(caches: Sequence[Any]):
    """Compute what caches hold, so that they keep nothing alive that it is made of, nor room to grow.

    Args:
        caches (Sequence): One cache a layer.
    """
    for cache in caches:
        if isinstance(cache, BudgetKVCache | FullKVCache):
            held = cache.contents
            cache.contents = {n: mx.contiguous(a) if isinstance(a, mx.array) else a for n, a in held.items()}
    mx.eval([c.contents if isinstance(c, SparseKVCache) else c.state for c in caches])


def trimmable(caches: Sequence[Any]) -> int:
    """Return how many of the newest tokens every cache can give back.

    Args:
        caches (Sequence): One cache a layer.
    """
    return min(map(_trimmable, caches), default=0)


def _trimmable(cache: Any) -> int:
    n = getattr(cache, "trimmable", None)
    if isinstance(n, int):
        return n
    if not cache.is_trimmable():
        return 0
    return getattr(cache, "offset", 0)


def trimmed(caches: Sequence[Any], n: int) -> list[Any] | None:
    """Return copies without the newest tokens.

    Args:
        caches (Sequence): One cache a layer.
        n (int): Tokens to leave out.

    Returns:
        list, optional: The copies; ``None`` where a cache could not do it after all.
    """
    others = copies_of(caches)
    return others if not n or all(cache.trim(n) == n for cache in others) else None
