"""A KV cache that keeps a fixed number of entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..ops import gather_rows, write_rows
from .contents import pack, unpack
from .late import LateStates
from .numbers import Numbers
from .observed import Observed
from .sparse import SparseKVCache, snapshot

# Steps that may leave something open, and the share of the budget that they may be.
_MOST_LATE, _LATE_SHARE = 256, 4


class BudgetKVCache(SparseKVCache):
    """Keep at most ``budget`` entries once the prompt has been read.

    Slots are in the order of their positions until a step overwrites one;
    :meth:`sort` puts them back in order. Where the entries that the next steps
    replace are known, :meth:`plan` lays them last, and a step writes to a slot that
    is known without looking; else it writes where it is told to. It writes the key
    and the value of its token; what else an entry holds is not read while it is
    recent, so it is made for several tokens at once, by :meth:`settle`.

    Args:
        budget (int): Entries to keep.
        phase (int): Growing copies a prompt's cache, and what is copied is there
          twice: caches of odd and of even phase don't grow at once. Default: ``0``.

    Attributes:
        most_late (int): For how many steps at most what they leave open may wait: it is
          a hidden state each, as large as several entries.
        n_planned (int): Entries, the last ones, that the next steps replace in order.
        rows_a_text (int): Rows that a text has: its key heads, where each keeps its own.

    Raises ``ValueError`` if the budget is below 1.
    """

    evicts, phase, rows_a_text = True, 0, 1  # the last two of a cache that from_state builds
    _cut_at = 1 << 62  # tokens seen when an entry was last dropped; likewise: as if just now
    _saves_memory = "for less memory lower top_k, the number of entries that it keeps"

    def __init__(self, budget: int, phase: int = 0):
        if budget < 1:
            raise ValueError(f"[BudgetKVCache] 'budget' must be at least 1 but got {budget}.")
        self.budget = budget
        self.phase = phase
        super().__init__()

    @property
    def most_late(self) -> int:
        return max(1, min(_MOST_LATE, self.budget // _LATE_SHARE))

    def reset(self):
        """Empty the cache."""
        super().reset()
        self._positions: mx.array | None = None  # None: slot = position
        self._sorted = True
        self._numbers = Numbers()
        self.observed: Observed | None = None
        self._late = LateStates(self.most_late)
        self._late_slots: list[mx.array] = []  # theirs, where no plan tells them
        self.n_planned = self._cut_at = 0

    @property
    def n_late(self) -> int:
        """Entries whose index keys and retention scores are still to be made."""
        return len(self._late)

    @property
    def positions(self) -> mx.array | None:
        """Positions of the entries ``[B, size]``, int32; ``None`` when empty."""
        if self._positions is None:
            return super().positions
        if not self.n_late or self._late_slots:
            return self._positions[...]  # which writes in place don't reach
        end = self._size - self.n_planned  # steps of a plan leave their positions to be written when wanted
        new = mx.arange(self.offset - self.n_late, self.offset, dtype=mx.int32)
        new = mx.broadcast_to(new, (self._positions.shape[0], self.n_late))
        before, after = self._positions[:, : end - self.n_late], self._positions[:, end:]
        return mx.concatenate([before, new, after], axis=1)

    @property
    def number(self) -> int:
        """What the next token's key is rotated by."""
        return self.offset - self.shift

    @property
    def shift(self) -> int:
        """How far numbers, by which new keys are rotated, are behind positions."""
        return self._numbers.shift

    @property
    def numbers(self) -> mx.array | None:
        """What the entries' keys are rotated by ``[B, size]``, int32; ``None`` when empty."""
        return None if self.empty() else self._numbers.of(self.positions)

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
        prune, and the head's own for newer entries; a rule may set others."""
        return self._retention(1)

    @worth.setter
    def worth(self, worth: mx.array):
        self._buffers[3][:, 0, : self._size, 1] = worth
        self._tie(self._buffers[3])

    def _retention(self, column: int) -> mx.array | None:
        if self._buffers is None or len(self._buffers) < 4:
            return None
        return self._fetch(3)[:, 0, :, column]

    def append(self, *entries: mx.array):
        """Add entries after those there are: see :meth:`SparseKVCache.append`.

        Args:
            *entries (mx.array): As there, and where there is a retention head its
              scores, twice, ``[B, 1, L, 2]`` in float32.
        """
        if self.evicted:
            B, _, L, _ = entries[0].shape
            new = mx.broadcast_to(mx.arange(self.offset, self.offset + L, dtype=mx.int32), (B, L))
            self._positions = mx.concatenate([self._positions, new], axis=1)
        super().append(*entries)
        if self.evicted:
            self._tie(self._positions)

    def _room(self, n: int, L: int) -> int:
        # Growing copies all there is, and on CUDA MLX makes a graph of every new sequence
        # of operations. A prompt's room is given back by the prune, so it may be up to
        # half too much, and grow seldom.
        if L < self.step:
            return super()._room(n, L)
        growth = max(self.step, (1 << (n - 1).bit_length()) // 4)
        # Eight phases save little more than two (docs/log.md), and grow more often.
        phase = growth // 2 * (self.phase % 2)
        return phase + -(-(n - phase) // growth) * growth

    def observe(self, queries: mx.array, weights: mx.array, limit: int):
        """Remember the last index queries of a prompt, after their append.

        Args:
            queries (mx.array): ``[B, Hi, W, Di]``, of the newest ``W`` tokens.
            weights (mx.array): Head weights ``[B, W, Hi]``.
            limit (int): Queries to remember.
        """
        n = queries.shape[2]
        new = Observed(queries, weights, tuple(range(self.offset - n, self.offset)))
        self.observed = (new if self.observed is None else self.observed.joined(new)).last(limit)
        self._tie(self.observed.queries, self.observed.weights)

    def prune(self, slots: mx.array, worth: mx.array | None = None, n_planned: int = 0):
        """Drop all entries but some, and forget the observed queries.

        Args:
            slots (mx.array): Slots to keep ``[B, budget]``, of a sorted cache, ascending.
            worth (mx.array, optional): What orders the entries ``[B, size]`` for
              later evictions, in place of the head's own scores.
            n_planned (int): How many of the slots, not ascending, are laid last, as by
              :meth:`plan`. Default: ``0``.
        """
        if worth is not None:
            self.worth = worth
        self.plan(slots, n_planned)
        self.observed = None

    def plan(self, order: mx.array, n_planned: int):
        """Lay the entries that the next steps replace last, in their order.

        Args:
            order (mx.array): The slots of a sorted cache that stay ``[B, n]`` or ``[1, n]``, in their new order.
            n_planned (int): How many entries the next steps replace.
        """
        B = self._buffers[0].shape[0]
        self._take(mx.broadcast_to(order, (B, order.shape[1])))
        self._set_planned(n_planned)

    def renumber(self, turn: Callable[[mx.array, mx.array], mx.array]):
        """Number entries from 0 on, in the order of the text, after a prune or a plan;
        ``turn`` rotates keys ``[B, Hkv, n, D]`` on by ``[B, n]`` positions."""
        self._buffers[0] = self._numbers.renew(self.positions, self.offset, self.keys, turn, self._sorted)
        self._tie(*self._numbers.arrays)

    def _set_planned(self, n: int):
        self.n_planned = n
        self._sorted = n == 0

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
        self._add_late(x)
        self.advance(1)

    def replace(self, slots: mx.array, keys: mx.array, values: mx.array, x: mx.array):
        """Overwrite one entry a batch row with the next token's.

        Args:
            slots (mx.array): The slot in each row ``[B]``, int32.
            keys, values, x (mx.array): As of :meth:`replace_planned`.
        """
        # A copy the first time: the property's array is shared.
        positions = mx.array(self.positions) if not self.evicted else self._positions
        offset = mx.full((slots.shape[0], 1), self.offset, mx.int32)
        self._buffers[0] = write_rows(self._buffers[0], keys, slots[:, None], axis=2)
        self._buffers[1] = write_rows(self._buffers[1], values, slots[:, None], axis=2)
        self._positions = write_rows(positions, offset, slots[:, None], axis=1)
        self._late_slots.append(slots)
        self._add_late(x)
        self._tie(self._positions)
        self.offset = self._cut_at = self.offset + 1
        self._sorted = False

    def _add_late(self, x: mx.array):
        if (written := self._late.add(x)) is not None:
            self._tie(written)

    def settle(self, project: Callable[[mx.array, int], Sequence[mx.array]]):
        """Make the index keys and retention scores of the latest steps' entries.

        Args:
            project (callable): From hidden states ``[B, n, dim]`` and the first one's
              position to what :meth:`append` takes after keys and values.
        """
        if not self.n_late:
            return
        end = self._size - self.n_planned
        if self._positions is not None and not self._late_slots:
            late = mx.arange(self.offset - self.n_late, self.offset, dtype=mx.int32)
            self._positions[:, end - self.n_late : end] = late
        entries = project(self._late.join(), self.offset - self.n_late)
        at = mx.stack(self._late_slots, axis=1) if self._late_slots else None
        for i, new in enumerate(entries, start=2):
            if at is not None and new is not None:
                self._buffers[i] = write_rows(self._buffers[i], new, at, axis=2)
            elif new is not None:
                self._buffers[i][..., end - self.n_late : end, :] = new
        self._late.clear()
        self._late_slots.clear()
        self._tie(*self._buffers[2:], self._positions)

    # Entries that another object keeps for a while: see Stack.

    def advance(self, n: int):
        """Note the next ``n`` tokens: each replaced a planned entry, or came after the last one."""
        self.offset += n
        if self.n_planned:
            self._cut_at = self.offset
            self._set_planned(self.n_planned - n)
        else:
            self._size += n

    def park(self) -> list[mx.array | None]:
        """Hand over all that entries have, and what is late, up to :meth:`unpark`."""
        buffers, self._buffers = [self._fetch(i) for i in range(len(self._buffers))], None
        self._parked_at = self._size - self.n_planned
        self._late.clear()
        return buffers

    def unpark(self, buffers: list[mx.array | None], late: mx.array | None):
        """Take entries back, and what is late ``[B, n, dim]``, after :meth:`advance`."""
        self._buffers = buffers
        if self._positions is not None:
            n = self._size - self.n_planned - self._parked_at
            new = mx.arange(self.offset - n, self.offset, dtype=mx.int32)
            self._positions[:, self._parked_at : self._parked_at + n] = new
        if late is not None:
            self._late.add(late)

    def sort(self):
        """Put the slots in the order of their positions."""
        if not self._sorted:
            self._take(mx.argsort(self._positions, axis=-1).astype(mx.int32))
            self._set_planned(0)

    def _take(self, slots: mx.array):
        positions = self.positions
        self._numbers.take(positions, slots)
        self._positions = mx.take_along_axis(positions, slots, axis=1)
        held = map(self._fetch, range(len(self._buffers)))
        self._buffers = [x if x is None else gather_rows(x, slots) for x in held]
        if slots.shape[1] < self._size:
            self._cut_at = self.offset
        self._size = slots.shape[1]
        self._tie(*self._buffers[2:], self._positions, *self._numbers.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of entries, positions and observed queries, as allocated."""
        extra = self._numbers.arrays + ([] if self._positions is None else [self._positions])
        if self.observed is not None:
            extra += self.observed[:2]
        return super().nbytes + self._late.nbytes + sum(a.nbytes for a in extra)

    @property
    def contents(self) -> dict[str, Any]:
        """What a copy needs, by name: arrays, whole numbers and ``None``."""
        return snapshot(pack(self))

    @contents.setter
    def contents(self, contents: Mapping[str, Any]):
        unpack(self, snapshot(contents))

    def _is_trimmable(self) -> bool:
        return not self.evicted

    @property
    def trimmable(self) -> int:
        """As of every cache; where entries have been dropped, the tokens since then."""
        return max(0, self.offset - self._cut_at) if self.evicted else self.offset

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; return how many were."""
        if self.evicted and 0 < n <= self.trimmable:
            self.sort()
            self._size, self.offset = self._size - n, self.offset - n
            self._positions = self._positions[:, : self._size]
            self.prompt.reopen()
        else:
            n = super().trim(n)
        self._late.drop(n)
        if self.observed is not None and n:
            self.observed = self.observed.before(self.offset)
        return n
