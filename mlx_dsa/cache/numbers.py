"""What the keys of a cache are rotated by, where entries have been numbered anew."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..ops import gather_rows


class Numbers:
    """Number the entries of a cache from 0 on, in the order of the text, whenever told to.

    Until then numbers are positions. Tokens that come later go on counting, in whatever
    slots they stand. Keys in 16 bits are kept unrotated, too: an entry may live through
    hundreds of numberings, and the roundings of as many turns would add up (docs/log.md).

    Attributes:
        shift (int): How far the numbers of new tokens are behind their positions.
    """

    def __init__(self):
        self.shift = 0
        self._until = 0  # the position from which tokens go on counting
        self._given: mx.array | None = None  # [B, n], of the first n slots
        self._unrotated: mx.array | None = None  # [B, Hkv, n, D], likewise

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
        if self._unrotated is not None:
            self._unrotated = gather_rows(self._padded(positions.shape[1]), slots)
        if self._given is not None:
            self._given = mx.take_along_axis(self.of(positions), slots, axis=1)

    def renew(
        self,
        positions: mx.array,
        offset: int,
        keys: mx.array,
        turn: Callable[[mx.array, mx.array], mx.array],
    ) -> mx.array:
        """Number entries anew.

        Args:
            positions (mx.array): Of all entries ``[B, size]``.
            offset (int): Tokens seen.
            keys (mx.array): Their keys ``[B, Hkv, size, D]``.
            turn (callable): Rotates keys on by ``[B, size]`` positions.

        Returns:
            mx.array: The keys, rotated by the new numbers.
        """
        before, size = self.of(positions), positions.shape[1]
        numbers = mx.argsort(mx.argsort(positions, axis=1), axis=1).astype(mx.int32)
        if keys.dtype == mx.float32:
            keys = turn(keys, numbers - before)
        else:
            unrotated = turn(keys, -before)
            if self._unrotated is not None:
                is_new = (positions >= self._until)[:, None, :, None]
                unrotated = mx.where(is_new, unrotated, self._padded(size))
            self._unrotated = unrotated
            keys = turn(unrotated, numbers)
        self._given, self._until, self.shift = numbers, offset, offset - size
        return keys

    def _padded(self, size: int) -> mx.array:
        more = size - self._unrotated.shape[2]
        widths = [(0, 0), (0, 0), (0, more), (0, 0)]
        return mx.pad(self._unrotated, widths) if more else self._unrotated

    @property
    def arrays(self) -> list[mx.array]:
        """What takes memory."""
        return [a for a in (self._given, self._unrotated) if a is not None]

    @property
    def contents(self) -> list[mx.array | int | None]:
        """What a copy needs."""
        return [self._given, self._until, self.shift, self._unrotated]

    @contents.setter
    def contents(self, contents: list[mx.array | int | None]):
        self._given, self._until, self.shift, self._unrotated = contents
