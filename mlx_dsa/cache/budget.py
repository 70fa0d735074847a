"""A KV cache that keeps a fixed number of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..ops import gather_rows, write_rows
from .full import FullKVCache


class Window(NamedTuple):
    """The last prompt queries of the indexer, which decide what a prune keeps.

    Args:
        queries (mx.array): ``[B, Hi, W, Di]``.
        weights (mx.array): Head weights ``[B, W, Hi]``.
        positions (tuple of int): Their positions, ascending.
    """

    queries: mx.array
    weights: mx.array
    positions: tuple[int, ...]


class BudgetKVCache(FullKVCache):
    """Keep at most ``budget`` entries once the prompt has been read.

    Slots are in the order of their positions until a step overwrites one;
    :meth:`sort` puts them back in order. Where the entries that the next steps
    replace are known, :meth:`plan` lays them last, and a step writes to a slot that
    is known without looking; else it writes where it is told to. It writes the key
    and the value of its token; what else an entry holds is not read while it is
    recent, so it is made for several tokens at once, by :meth:`settle`.

    Args:
        budget (int): Entries to keep.

    Raises:
        ValueError: If the budget is below 1.
    """

    def __init__(self, budget: int):
        if budget < 1:
            raise ValueError(
                f"[BudgetKVCache] 'budget' must be at least 1 but got {budget}."
            )
        self.budget = budget
        super().__init__()

    def reset(self):
        """Empty the cache."""
        super().reset()
        self._positions: mx.array | None = None  # None: slot = position
        self._sorted = True
        self.window: Window | None = None
        # Hidden states of the latest steps, and their slots, where no plan tells them.
        self._late: list[tuple[mx.array, mx.array | None]] = []
        self.n_planned = 0

    @property
    def n_late(self) -> int:
        """Entries whose index keys and retention scores are still to be made."""
        return len(self._late)

    @property
    def positions(self) -> mx.array | None:
        """Positions of the entries ``[B, size]``, int32; ``None`` when empty."""
        if self._positions is None:
            return super().positions
        if not self._late or self._late[0][1] is not None:
            return self._positions
        # Steps of a plan leave their positions to be written when they are wanted.
        end = self._size - self.n_planned
        new = mx.arange(self.offset - self.n_late, self.offset, dtype=mx.int32)
        new = mx.broadcast_to(new, (self._positions.shape[0], self.n_late))
        before, after = self._positions[:, : end - self.n_late], self._positions[:, end:]
        return mx.concatenate([before, new, after], axis=1)

    @property
    def evicted(self) -> bool:
        """Whether an entry has ever been dropped."""
        return self._positions is not None

    @property
    def retention(self) -> mx.array | None:
        """Scores of the retention head ``[B, size]``, float32; ``None`` without one."""
        return self._retention(0)

    @property
    def worth(self) -> mx.array | None:
        """Scores that order the entries for eviction, likewise: those of the last
        prune, and the head's own for newer entries."""
        return self._retention(1)

    def _retention(self, column: int) -> mx.array | None:
        if self._buffers is None or len(self._buffers) < 4:
            return None
        return self._fetch(3)[:, 0, :, column]

    def append(self, *entries: mx.array):
        """Add entries after those there are: see :meth:`FullKVCache.append`.

        Args:
            *entries (mx.array): As there, and where there is a retention head its
              scores, twice, ``[B, 1, L, 2]`` in float32.
        """
        if self.evicted:
            B, L = entries[0].shape[0], entries[0].shape[2]
            new = mx.arange(self.offset, self.offset + L, dtype=mx.int32)
            new = mx.broadcast_to(new, (B, L))
            self._positions = mx.concatenate([self._positions, new], axis=1)
        super().append(*entries)
        if self.evicted:
            self._tie(self._positions)

    def observe(self, queries: mx.array, weights: mx.array, limit: int):
        """Remember the last index queries of a prompt, after their append.

        Args:
            queries (mx.array): ``[B, Hi, W, Di]``, of the newest ``W`` tokens.
            weights (mx.array): Head weights ``[B, W, Hi]``.
            limit (int): Queries to remember.
        """
        n = queries.shape[2]
        positions = tuple(range(self.offset - n, self.offset))
        if self.window is not None:
            queries = mx.concatenate([self.window.queries, queries], axis=2)
            weights = mx.concatenate([self.window.weights, weights], axis=1)
            positions = self.window.positions + positions
        self.window = Window(
            queries[:, :, -limit:], weights[:, -limit:], positions[-limit:]
        )
        self._tie(self.window.queries, self.window.weights)

    def prune(self, slots: mx.array, worth: mx.array | None = None):
        """Drop all entries but some, and forget the observed queries.

        Args:
            slots (mx.array): Slots to keep ``[B, budget]``, ascending, of a sorted
              cache.
            worth (mx.array, optional): What orders the entries ``[B, size]`` for
              later evictions, in place of the head's own scores.
        """
        if worth is not None:
            self._buffers[3] = mx.stack([self.retention, worth], axis=-1)[:, None]
        B = self._buffers[0].shape[0]
        slots = mx.broadcast_to(slots, (B, slots.shape[-1]))
        self._take(slots)
        self.window = None

    def plan(self, slots: mx.array):
        """Lay the entries that the next steps replace last, in their order.

        Args:
            slots (mx.array): Their slots ``[B, n]`` or ``[1, n]``, int32, of a sorted
              cache.
        """
        B, n = self._buffers[0].shape[0], slots.shape[1]
        order = mx.broadcast_to(mx.arange(self._size), (B, self._size))
        last = mx.broadcast_to(mx.arange(self._size, self._size + n), (B, n))
        order = mx.put_along_axis(order, mx.broadcast_to(slots, (B, n)), last, axis=1)
        self._take(mx.argsort(order, axis=-1).astype(mx.int32))
        self.n_planned = n
        self._sorted = False

    def replace_planned(self, keys: mx.array, values: mx.array, x: mx.array):
        """Overwrite the planned entry with the next token's.

        Args:
            keys (mx.array): ``[B, Hkv, 1, D]``.
            values (mx.array): ``[B, Hkv, 1, D]``.
            x (mx.array): The token's hidden state ``[B, 1, dim]``, for
              :meth:`settle`.
        """
        slot = self._size - self.n_planned
        for buffer, new in zip(self._buffers, (keys, values)):
            buffer[..., slot : slot + 1, :] = new
        self._late.append((x, None))
        self.offset += 1
        self.n_planned -= 1
        self._sorted = self.n_planned == 0

    def replace(self, slots: mx.array, keys: mx.array, values: mx.array, x: mx.array):
        """Overwrite one entry a batch row with the next token's.

        Args:
            slots (mx.array): The slot in each row ``[B]``, int32.
            keys (mx.array): ``[B, Hkv, 1, D]``.
            values (mx.array): ``[B, Hkv, 1, D]``.
            x (mx.array): The token's hidden state ``[B, 1, dim]``, for
              :meth:`settle`.
        """
        # A copy the first time: the property's array is shared.
        positions = mx.array(self.positions) if not self.evicted else self._positions
        offset = mx.full((slots.shape[0], 1), self.offset, mx.int32)
        self._buffers[0] = write_rows(self._buffers[0], keys, slots[:, None], axis=2)
        self._buffers[1] = write_rows(self._buffers[1], values, slots[:, None], axis=2)
        self._positions = write_rows(positions, offset, slots[:, None], axis=1)
        self._late.append((x, slots))
        self.offset += 1
        self._sorted = False

    def settle(self, project: Callable[[mx.array, int], Sequence[mx.array]]):
        """Make the index keys and retention scores of the latest steps' entries.

        Args:
            project (callable): From hidden states ``[B, n, dim]`` and the position of
              the first to what :meth:`append` takes after keys and values.
        """
        if not self._late:
            return
        self._positions = self.positions
        x, slots = zip(*self._late)
        x = mx.concatenate(x, axis=1)
        end = self._size - self.n_planned
        entries = project(x, self.offset - x.shape[1])
        for i, new in enumerate(entries, start=2):
            if slots[0] is None:
                self._buffers[i][..., end - x.shape[1] : end, :] = new
            else:
                at = mx.stack(slots, axis=1)
                self._buffers[i] = write_rows(self._buffers[i], new, at, axis=2)
        self._late = []
        self._tie(*self._buffers[2:], self._positions)

    def sort(self):
        """Put the slots in the order of their positions."""
        if not self._sorted:
            self._take(mx.argsort(self._positions, axis=-1).astype(mx.int32))
            self._sorted = True
            self.n_planned = 0

    def _take(self, slots: mx.array):
        self._positions = mx.take_along_axis(self.positions, slots, axis=1)
        self._buffers = [
            gather_rows(self._fetch(i), slots) for i in range(len(self._buffers))
        ]
        self._size = slots.shape[1]
        self._tie(*self._buffers[2:], self._positions)

    @property
    def nbytes(self) -> int:
        """Bytes of entries, positions and observed queries, as allocated."""
        extra = [] if self._positions is None else [self._positions]
        if self.window is not None:
            extra += self.window[:2]
        extra += [x for x, _ in self._late]
        return super().nbytes + sum(a.nbytes for a in extra)

    @property
    def state(self) -> list[Any]:
        """What a copy needs: arrays, whole numbers and ``None``."""
        late = [None, None]
        if self._late:
            x, slots = zip(*self._late)
            late = [mx.concatenate(x, axis=1), None]
            if slots[0] is not None:
                late[1] = mx.stack(slots, axis=1)
        window = [None, None, None]
        if self.window is not None:
            window = [*self.window[:2], mx.array(self.window.positions, mx.int32)]
        return [
            *(self.keys, self.values, self.index_keys, self.offset),
            *(self.positions if self.evicted else None, int(self._sorted)),
            *(self.budget, self.n_planned),
            *window,
            *late,
            *(self._fetch(i) for i in range(3, len(self._buffers or ()))),
        ]

    @state.setter
    def state(self, state: Sequence[Any]):
        keys, values, index_keys, self.offset, *state = state
        self._positions, in_order, self.budget, self.n_planned, *state = state
        *window, late_x, late_slots = state[:5]
        self._buffers = None if keys is None else [keys, values, index_keys, *state[5:]]
        self._late = []
        if late_x is not None:
            self._late = [
                (late_x[:, i : i + 1], None if late_slots is None else late_slots[:, i])
                for i in range(late_x.shape[1])
            ]
        self._size = 0 if keys is None else keys.shape[2]
        self._sorted = bool(in_order)
        self.window = None
        if window[0] is not None:
            self.window = Window(*window[:2], tuple(window[2].tolist()))

    def is_trimmable(self) -> bool:
        """Return whether the newest tokens can be taken back: not after eviction.

        Not while empty, either: so mlx-lm refuses speculative decoding, whose calls
        of several tokens look like prompts and would never be evicted from.
        """
        return not self.evicted and not self.empty()

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; return how many were."""
        n = super().trim(n)
        if self.window is not None and n:
            keep = sum(p < self.offset for p in self.window.positions)
            queries, weights, positions = self.window
            self.window = (
                Window(queries[:, :, :keep], weights[:, :keep], positions[:keep])
                if keep
                else None
            )
        return n
