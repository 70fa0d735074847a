"""Where a wrong answer was lost: in each layer, was the needle evicted, or not selected?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...patch import SparsePatch

STATES = ("evicted", "not selected", "read")
_NOWHERE = -2  # a position that no slot has: what is empty has -1


class Watch:
    """Follow the needle's value through the layers of a patched model.

    Args:
        patch (SparsePatch): the patch in force; ``None`` (dense) has nothing to follow.
        values (list): for each conversation, the (start, stop) positions of the value.
    """

    def __init__(self, patch: SparsePatch | None, values: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.layers: dict[int, Any] = dict(patch.layers) if patch else {}
        self.values = [[p for a, b in spans for p in range(a, b)] for spans in values]
        self.lost: list[Any] = [None] * len(values)
        width = max(map(len, self.values), default=0)
        padded = [row + [_NOWHERE] * (width - len(row)) for row in self.values]
        self._wanted = np.array(padded, dtype=np.int32)
        self._members: list[int] = []
        self._hits: dict[int, mx.array] = {}
        for number, layer in self.layers.items():
            layer.attend_selected = self._spy(number, layer.attend_selected)

    def _spy(self, number: int, attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def attend_selected(queries: mx.array, cache: Any, slots: mx.array) -> mx.array:
            # One query: the last of a prompt, or a token of the answer. Only then is it copied.
            if queries.shape[2] == 1 and self._members:
                read = slots.flatten(1)  # by any head, where each has its own
                positions = mx.take_along_axis(cache.positions, mx.maximum(read, 0), axis=1)
                self._note(number, mx.where(read < 0, -1, positions))
            return attend(queries, cache, slots)

        return attend_selected

    def _note(self, number: int, selected: mx.array) -> None:
        wanted = mx.array(self._wanted[self._members])
        seen = (wanted[:, :, None] == selected[:, None]).any(axis=-1)
        before = self._hits.get(number)
        self._hits[number] = seen if before is None else seen | before
        mx.async_eval(self._hits[number])

    def begin(self, members: list[int]) -> None:
        """Start to follow: the rows of the model's next calls are these conversations, or none."""
        self._members, self._hits = members, {}

    def finished(self, members: list[int], caches: Sequence[Any], rows: list[int]) -> None:
        """Note what became of the values when the answers of some conversations are complete."""
        wanted, rows = mx.array(self._wanted[members]), mx.array(rows)
        found: dict[int, Any] = {}
        for number in self.layers:
            cache, hits = caches[number], self._hits.get(number)
            # A cache that evicts nothing holds them all.
            kept = None
            if getattr(cache, "evicted", False):
                kept = cache.positions
                # What one head keeps is there.
                kept = kept.reshape(kept.shape[0] // cache.rows_a_text, -1)[rows]
            there = None if kept is None else (wanted[:, :, None] == kept[:, None]).any(axis=-1)
            # Where something was evicted, every entry of the cache is attended to.
            seen = None if hits is None or there is not None else hits[rows]
            found[number] = there, seen
        mx.eval(found)  # all at once: each wait for a GPU costs
        for number, pair in found.items():
            found[number] = [None if x is None else np.array(x) for x in pair]
        for i, member in enumerate(members):
            n = len(self.values[member])
            self.lost[member] = {
                number: _state(*(None if x is None else x[i, :n] for x in pair)) for number, pair in found.items()
            }


def _state(there: np.ndarray | None, seen: np.ndarray | None) -> str:
    """Return what became of a value's tokens `[n]`: are they in the cache, were they selected?"""
    if there is not None and not there.all():
        return "evicted"
    return "read" if seen is None or seen.all() else "not selected"


def verdict(lost: Mapping[int, str] | None) -> str | None:
    """Return what happened in most layers (the worse on a draw), or ``None``."""
    if not lost:
        return None
    counts = Counter(lost.values())
    return max(STATES, key=lambda state: (counts[state], -STATES.index(state)))
