"""Budget caches in decode, as rows of one array a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .budget import BudgetKVCache
from .late import LateStates
from .sparse import SparseKVCache

# Slots by which rows that are not full yet grow together.
_STEP = 256


class Stack:
    """Hold the entries of budget caches, each of one conversation, while they decode.

    All rows write their next token to the same slot, the cursor, which is one operation for
    all: attention minds no order, so a row is laid round until what it replaces next, or its
    first empty slot, lies there. What is a row's own stays with its cache: its positions,
    its plan of evictions, what its keys are rotated by. So a row does at each step what it
    would do alone.

    Args:
        rows (list of BudgetKVCache): Each within its budget, with evictions planned where it is
          full, and nothing late. Their entries move here, until :meth:`release`.

    Attributes:
        steps (int): Steps that the rows' caches have not been told of yet.
    """

    def __init__(self, rows: list[BudgetKVCache]):
        self.rows = rows
        longest = max(row.size() for row in rows)
        self._n_slots = min(rows[0].budget, -(-(longest + 1) // _STEP) * _STEP)
        self._cursor = self.steps = 0
        self._late = LateStates(rows[0].most_late)
        self._places = [0] * len(rows)
        laid = [self._lay(i) for i in range(len(rows))]
        self._buffers: list[mx.array] = [None if x[0] is None else mx.concatenate(list(x), axis=0) for x in zip(*laid)]
        self._count()

    @property
    def keys(self) -> mx.array:
        """Keys ``[n, Hkv, slots, D]``, rotated."""
        return self._buffers[0]

    @property
    def values(self) -> mx.array:
        """Values, likewise."""
        return self._buffers[1]

    @property
    def mask(self) -> mx.array | None:
        """Which slots hold an entry ``[n, 1, 1, slots]``, bool; ``None`` where all do."""
        return self._there

    @property
    def numbers(self) -> mx.array:
        """What the next tokens' keys are rotated by ``[n]``, int32."""
        return self._numbers + self.steps if self.steps else self._numbers

    @property
    def nbytes(self) -> int:
        """Bytes of all entries and of what waits."""
        return self._late.nbytes + sum(x.nbytes for x in self._buffers if x is not None)

    def prepare(self, make_room: Callable[[BudgetKVCache], Any], project: Callable, most_late: int) -> bool:
        """Make ready for a step: each row knows what it replaces.

        Args:
            make_room (callable): Plans what a full cache's next steps replace.
            project (callable): As of :meth:`BudgetKVCache.settle`.
            most_late (int): Steps after which what they left open is made.

        Returns:
            bool: ``False`` where there is no empty slot left for a row that is not full: the
            rows have to be stacked anew.
        """
        if len(self._late) >= min(most_late, self.rows[0].most_late):
            self.settle(project)
        if self.steps < self._ready:
            return True
        self.settle(project)
        self._tell()
        for i, row in enumerate(self.rows):
            if row.size() == row.budget and not row.n_planned:
                self._give_back(i)
                make_room(row)
                for buffer, new in zip(self._buffers, self._lay(i)):
                    if buffer is not None:
                        buffer[i : i + 1] = new
        self._count()
        return self._ready > 0

    def write(self, keys: mx.array, values: mx.array, x: mx.array):
        """Write the next token of each row over what it replaces.

        Args:
            keys (mx.array): ``[n, Hkv, 1, D]``, rotated by :attr:`numbers`.
            values (mx.array): ``[n, Hkv, 1, D]``.
            x (mx.array): Hidden states ``[n, 1, dim]``, for :meth:`settle`.
        """
        at = self._cursor
        for i, new in enumerate((keys, values)):
            self._buffers[i][..., at : at + 1, :] = new
        if self._there is not None:
            self._there[..., at : at + 1] = True
        written = self._late.add(x)
        if written is not None:
            self._tie(written)
        self._cursor = (at + 1) % self._n_slots
        self.steps += 1

    def settle(self, project: Callable[[mx.array, mx.array], Sequence[mx.array]]):
        """Make what the entries of the latest steps lack: see :meth:`BudgetKVCache.settle`."""
        n = len(self._late)
        if not n:
            return
        self._tell()
        first = mx.array([row.offset - n for row in self.rows], mx.int32)
        start = (self._cursor - n) % self._n_slots
        before_end = min(n, self._n_slots - start)
        for i, new in enumerate(project(self._late.join(), first), start=2):
            if new is not None:
                self._buffers[i][..., start : start + before_end, :] = new[..., :before_end, :]
                if before_end < n:
                    self._buffers[i][..., : n - before_end, :] = new[..., before_end:, :]
        self._late.clear()
        self._tie(*(x for x in self._buffers[2:] if x is not None))

    def release(self) -> list[BudgetKVCache]:
        """Give all entries back to their caches, what is late with them."""
        self._tell()
        for i in range(len(self.rows)):
            self._give_back(i)
        return self.rows

    def copy_row(self, i: int) -> SparseKVCache:
        """Return a cache that goes on by itself from where a row is."""
        self._tell()
        row = self.rows[i]
        self._give_back(i)
        copied = row.copy()
        row.park()
        return copied

    def filter(self, kept: list[int]):
        """Go on with some of the rows."""
        self._tell()
        at = mx.array(kept)
        self._buffers = [None if x is None else x[at] for x in self._buffers]
        if len(self._late):
            states, self._late = self._late.join()[at], LateStates(self.rows[0].most_late)
            self._late.add(states)
        self.rows, self._places = [self.rows[i] for i in kept], [self._places[i] for i in kept]
        self._count()

    # A row's own slots are in the order that its cache needs: slot s lies here at
    # (s + place) modulo the number of slots.

    def _lay(self, i: int) -> list[mx.array | None]:
        row = self.rows[i]
        next_slot = row.size() - row.n_planned
        self._places[i] = (self._cursor - next_slot) % self._n_slots
        return [self._round(x, row.size(), self._places[i]) for x in row.park()]

    def _round(self, x: mx.array | None, size: int, place: int) -> mx.array | None:
        if x is None:
            return None
        if size < self._n_slots:
            x = mx.pad(x, [(0, 0), (0, 0), (0, self._n_slots - size), (0, 0)])
        return mx.roll(x, place, 2) if place else x

    def _give_back(self, i: int):
        row, place = self.rows[i], self._places[i]
        rows = [None if x is None else x[i : i + 1] for x in self._buffers]
        # A view would keep all rows alive for as long as this one.
        rows = [x if x is None else mx.roll(x, -place, 2) if place else mx.contiguous(x) for x in rows]
        late = mx.contiguous(self._late.join()[i : i + 1]) if len(self._late) else None
        row.unpark([x if x is None else x[..., : row.size(), :] for x in rows], late)

    def _tell(self):
        """Tell the rows of the steps that they have taken."""
        for row in self.rows if self.steps else ():
            row.advance(self.steps)
        self._ready -= self.steps
        self._numbers = self.numbers
        self.steps = 0

    def _count(self):
        """Count for how many steps each row knows where its token goes."""
        free = [self._n_slots - row.size() for row in self.rows]
        self._ready = min(row.n_planned or n for row, n in zip(self.rows, free))
        self._numbers = mx.array([row.number for row in self.rows], mx.int32)
        self._there: mx.array | None = None
        if any(free):
            ahead = (mx.arange(self._n_slots) - self._cursor) % self._n_slots
            self._there = (ahead >= mx.array(free)[:, None])[:, None, None]

    def _tie(self, *arrays: mx.array):
        # What no output of this step depends on would pile up as a graph without bound.
        self._buffers[0] = mx.depends(self._buffers[0], list(arrays))
