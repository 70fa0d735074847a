"""What the keys of a cache are rotated by, where entries have been numbered anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..ops import gather_rows


class Numbers:
    """Number the entries of a cache from 0 on, in the order of the text, whenever told to.

    Until then numbers are positions. Tokens that come later go on counting, in whatever
    slots they stand. Keys in 16 bits are kept as they were first rotated, too, and turned from
    there: an entry may live through hundreds of numberings, and the roundings of as many
    turns would add up (docs/log.md).

    Attributes:
        shift (int): How far the numbers of new tokens are behind their positions.
    """

    def __init__(self):
        self.shift = 0
        self._until = 0  # the position from which tokens go on counting
        self._given: mx.array | None = None  # [B, n], of the first n slots
        self._first: mx.array | None = None  # [B, Hkv, n, D], likewise
        self._first_numbers: mx.array | None = None  # [B, n]: what those are rotated by

    def of(self, positions: mx.array) -> mx.array:
        """Return the numbers of entries.

        Args:
            positions (mx.array): Of all entries by slot ``[B, size]``, int32.

        Returns:
            mx.array: ``[B, size]``, int32.
        """
        if self._given is None:
            return positions
        more = positions.shape[1] - self._given.shape[1]
        given = mx.pad(self._given, [(0, 0), (0, more)]) if more else self._given
        return mx.where(positions < self._until, given, positions - self.shift)

    def take(self, positions: mx.array, slots: mx.array):
        """Follow entries to other slots.

        Args:
            positions (mx.array): Of all entries ``[B, size]``, where they stood.
            slots (mx.array): The slots that are kept ``[B, n]``, in their new order.
        """
        if self._first is not None:
            first, numbers = self._padded(positions.shape[1])
            self._first = gather_rows(first, slots)
            self._first_numbers = mx.take_along_axis(numbers, slots, axis=1)
        if self._given is not None:
            self._given = mx.take_along_axis(self.of(positions), slots, axis=1)

    def renew(
        self,
        positions: mx.array,
        offset: int,
        keys: mx.array,
        turn: Callable[[mx.array, mx.array], mx.array],
        in_order: bool,
    ) -> mx.array:
        """Number entries anew.

        Args:
            positions (mx.array): Of all entries ``[B, size]``.
            offset (int): Tokens seen.
            keys (mx.array): Their keys ``[B, Hkv, size, D]``.
            turn (callable): Rotates keys on by ``[B, size]`` positions.
            in_order (bool): Whether positions ascend.

        Returns:
            mx.array: The keys, rotated by the new numbers.
        """
        before, size = self.of(positions), positions.shape[1]
        if in_order:
            numbers = mx.broadcast_to(mx.arange(size, dtype=mx.int32), positions.shape)
        else:
            numbers = mx.argsort(mx.argsort(positions, axis=1), axis=1).astype(mx.int32)
        if keys.dtype != mx.float32:
            if self._first is not None:
                first, first_numbers = self._padded(size)
                is_new = positions >= self._until
                keys = mx.where(is_new[:, None, :, None], keys, first)
                before = mx.where(is_new, before, first_numbers)
            self._first, self._first_numbers = keys, before
        keys = turn(keys, numbers - before)
        self._given, self._until, self.shift = numbers, offset, offset - size
        return keys

    def _padded(self, size: int) -> tuple[mx.array, mx.array]:
        more = size - self._first.shape[2]
        if not more:
            return self._first, self._first_numbers
        first = mx.pad(self._first, [(0, 0), (0, 0), (0, more), (0, 0)])
        return first, mx.pad(self._first_numbers, [(0, 0), (0, more)])

    @property
    def arrays(self) -> list[mx.array]:
        """What takes memory."""
        return [a for a in (self._given, self._first, self._first_numbers) if a is not None]

    @property
    def contents(self) -> dict[str, Any]:
        """What a copy needs, by name."""
        first = {"first_keys": self._first, "first_numbers": self._first_numbers}
        return {"numbers": self._given, "numbered_until": self._until, "shift": self.shift, **first}

    @contents.setter
    def contents(self, contents: Mapping[str, Any]):
        self._given, self._until, self.shift = (contents[n] for n in ("numbers", "numbered_until", "shift"))
        self._first, self._first_numbers = contents["first_keys"], contents["first_numbers"]
