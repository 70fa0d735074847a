"""Hidden states of the latest steps, of which something is made for several at once."""

from __future__ import annotations

import mlx.core as mx

# States that are written at once. A step computes its state anyway: to keep it is free.
_WRITTEN = 16


class LateStates:
    """Gather hidden states until they are wanted as one array.

    To write each would be one more operation a layer and step, and to join all of
    them when they are wanted a copy of each, all in one step.

    Args:
        room (int): States for which memory is taken at once.
    """

    def __init__(self, room: int):
        self._room = room
        self._block: mx.array | None = None  # [B, capacity, dim], written in place
        self.clear()

    def clear(self):
        """Forget the states, and keep the room."""
        self._n_written = 0
        self._new: list[mx.array] = []
        self._n_new = 0

    def __len__(self) -> int:
        return self._n_written + self._n_new

    @property
    def nbytes(self) -> int:
        """Bytes of the room and of the states that wait outside it."""
        arrays = self._new if self._block is None else [self._block, *self._new]
        return sum(a.nbytes for a in arrays)

    def add(self, x: mx.array) -> mx.array | None:
        """Add states.

        Args:
            x (mx.array): Hidden states ``[B, n, dim]``, after those that there are.

        Returns:
            mx.array, optional: What was written, which some output must depend on, or
            its graph grows without bound.
        """
        self._new.append(x)
        self._n_new += x.shape[1]
        return self._write() if self._n_new >= _WRITTEN else None

    def drop(self, n: int):
        """Forget the newest ``n`` states, or all where there are fewer."""
        left = max(0, len(self) - n)
        if self._new:
            self._write()
        self._n_written = left

    def join(self) -> mx.array:
        """Return all states ``[B, n, dim]``; at least one must be there."""
        if self._new:
            self._write()
        return self._block[:, : self._n_written]

    def _write(self) -> mx.array:
        new = mx.concatenate(self._new, axis=1)
        start, stop = self._n_written, len(self)
        known = 0 if self._block is None else self._block.shape[1]
        if stop > known:
            more = max(stop, self._room) - known
            room = mx.zeros((new.shape[0], more, new.shape[2]), new.dtype)
            if known:
                room = mx.concatenate([self._block, room], axis=1)
            self._block = room
        self._block[:, start:stop] = new
        self._n_written, self._new, self._n_new = stop, [], 0
        return self._block
