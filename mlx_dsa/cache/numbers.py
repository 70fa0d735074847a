"""What the keys of a cache are rotated by, where entries have been numbered anew."""

from __future__ import annotations

import mlx.core as mx


class Numbers:
    """Number the entries of a cache from 0 on, in the order of the text, whenever told to.

    Until then numbers are positions. Tokens that come later go on counting, in whatever
    slots they stand.

    Attributes:
        shift (int): How far the numbers of new tokens are behind their positions.
    """

    def __init__(self):
        self.shift = 0
        self._until = 0  # the position from which tokens go on counting
        self._given: mx.array | None = None  # [B, n], of the first n slots

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
        if self._given is not None:
            self._given = mx.take_along_axis(self.of(positions), slots, axis=1)

    def renew(self, positions: mx.array, offset: int) -> mx.array:
        """Number entries anew.

        Args:
            positions (mx.array): Of all entries ``[B, size]``.
            offset (int): Tokens seen.

        Returns:
            mx.array: By how much each number grows ``[B, size]``, int32.
        """
        before = self.of(positions)
        self._given = mx.argsort(mx.argsort(positions, axis=1), axis=1).astype(mx.int32)
        self._until, self.shift = offset, offset - positions.shape[1]
        return self._given - before

    @property
    def arrays(self) -> list[mx.array]:
        """What takes memory."""
        return [] if self._given is None else [self._given]

    @property
    def contents(self) -> list[mx.array | int | None]:
        """What a copy needs."""
        return [self._given, self._until, self.shift]

    @contents.setter
    def contents(self, contents: list[mx.array | int | None]):
        self._given, self._until, self.shift = contents
