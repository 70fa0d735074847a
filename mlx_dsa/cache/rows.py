"""Caches of several conversations as rows of a batch, under mlx-lm's contract for batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from .foreign import marked
from .sparse import SparseKVCache
from .stack import Stack


class _Held:
    """A row's cache, and the batches that count it theirs: one that mlx-lm has let go is none."""

    def __init__(self, cache: SparseKVCache, owner: RowsCache):
        self.cache = cache
        self.owners = WeakSet([owner])


class RowsCache:
    """Hold the caches of one layer, one a conversation.

    What mlx-lm does with a batch is done to a list: a conversation is read, cut and pruned in
    its own cache, as it would be alone. Budgets in decode are stacked (:meth:`stacked`).

    Args:
        caches (sequence of SparseKVCache): One a row; the batch goes on with them.
    """

    def __init__(self, caches: Sequence[SparseKVCache]):
        self._held = [_Held(cache, self) for cache in caches]
        self._stack: Stack | None = None
        self._left: list[int] | None = None  # tokens of each row's prompt, where they differ
        # A merged batch is of prompts: mlx-lm deep-copies it to split off what is to be answered,
        # and reads its state after each call until then.
        self._reads, self._called, self._state_read = True, False, False

    @property
    def rows(self) -> list[SparseKVCache]:
        """The caches, with their entries where these are not stacked."""
        return [held.cache for held in self._held]

    def begin(self):
        """Note that a call of the model begins."""
        if self._called and not self._state_read:
            self._reads = False
        self._called, self._state_read = True, False

    def parts(self, n_tokens: int) -> Iterator[tuple[SparseKVCache, int]]:
        """Yield each row's cache, and how many of a call's tokens are its own, the first ones.

        Args:
            n_tokens (int): Tokens of the call, for the longest row.
        """
        self._unstack()
        for i in range(len(self._held)):
            n = n_tokens
            if self._left is not None:
                n = min(n_tokens, self._left[i])
                self._left[i] -= n
            row = self._own(i)
            if self._reads and n:
                row.prompt.reopen()  # a call of one token after an answer is not a step of it
            yield row, n

    def stacked(
        self, make_room: Callable[[Any], Any], project: Callable[[mx.array, Any], Sequence[Any]], most_late: int
    ) -> Stack | None:
        """Return the rows as one, ready for a step of decode of each.

        Args:
            make_room (callable): Cuts a cache to its budget, and plans what the next steps
              replace where it is full.
            project (callable): As of :meth:`BudgetKVCache.settle`.
            most_late (int): Steps after which what they left open is made.

        Returns:
            Stack: ``None`` where a row's call is still of its prompt.
        """
        stack = self._stack
        if self._reads:
            return None
        if stack is None or len(stack.rows) < len(self._held):
            new = self._held[0 if stack is None else len(stack.rows) :]
            if not all(held.cache.prompt.decodes for held in new):
                return None
            if stack is not None:
                stack.settle(project)
        elif stack.prepare(make_room, project, most_late):
            return stack
        self._unstack()
        rows: list[Any] = [self._own(i) for i in range(len(self._held))]
        for row in rows:
            row.prompt.call(1)
            row.settle(project)
            make_room(row)
        self._stack = stack = Stack(rows)
        return stack

    def _own(self, i: int) -> SparseKVCache:
        """Return a row's cache, for this batch to change."""
        held = self._held[i]
        if len(held.owners) > 1:
            held.owners.discard(self)
            held = self._held[i] = _Held(held.cache.copy(), self)
        return held.cache

    def _unstack(self):
        if self._stack is not None:
            self._stack.release()
            self._stack = None

    # mlx-lm's contract from here on.

    def filter(self, batch_indices: Sequence[int]):
        """Go on with some of the rows, in this order."""
        kept = [int(i) for i in batch_indices]
        n = 0 if self._stack is None else len(self._stack.rows)
        stacked = [i for i in kept if i < n]
        if self._stack is not None and stacked:
            if kept[: len(stacked)] != stacked:
                self._unstack()
            elif len(stacked) < n:
                self._stack.filter(stacked)
        else:
            self._unstack()
        for i in set(range(len(self._held))) - set(kept):
            self._held[i].owners.discard(self)
        self._held = [self._held[i] for i in kept]
        if self._left is not None:
            self._left = [self._left[i] for i in kept]

    def extend(self, other: RowsCache):
        """Add another batch's rows after these."""
        other._unstack()
        for held in other._held:
            held.owners.discard(other)
            held.owners.add(self)
        self._held += other._held

    def extract(self, idx: int) -> SparseKVCache:
        """Return a cache that goes on by itself from where a row is."""
        if self._stack is not None and idx < len(self._stack.rows):
            return self._stack.copy_row(idx)
        return self._held[idx].cache.copy()

    def merge(self, caches: Sequence[SparseKVCache]) -> RowsCache:
        """Return a batch of caches."""
        return RowsCache(caches)

    def prepare(self, *, lengths: Sequence[int] | None = None, left_padding: Any = None, right_padding: Any = None):
        """Note how many tokens of the next calls are each row's own, the first ones.

        Raises:
            ValueError: If they are padded on the left.
        """
        if left_padding is not None and any(left_padding):
            raise ValueError("[RowsCache] prompts must be padded on the right. Use mlx_lm.batch_generate.")
        if lengths is not None:
            self._left = list(lengths)

    def finalize(self):
        """Note that the prompts of unequal length have been read."""
        self._left = None

    def __deepcopy__(self, memo: dict) -> RowsCache:
        # mlx-lm copies a whole batch to split it: a row is copied once both go on with it.
        self._unstack()
        other = RowsCache(())
        other._held, other._left = list(self._held), self._left and list(self._left)
        other._reads = False
        for held in self._held:
            held.owners.add(other)
        return other

    def size(self) -> int:
        """Return the number of entries of the longest row."""
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        """Return whether no row has entries."""
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        n = 0 if self._stack is None else len(self._stack.rows)
        return (self._stack.nbytes if self._stack else 0) + sum(h.cache.nbytes for h in self._held[n:])

    @property
    def state(self) -> dict[str, Any]:
        """What has to be evaluated; mlx-lm reads it after each call of a prompt."""
        self._unstack()
        self._state_read = True
        for row in self.rows:
            row.prompt.state_was_read()
        return marked({str(i): row.contents for i, row in enumerate(self.rows)})

    def is_trimmable(self) -> bool:
        """Return whether tokens can be taken back: of single caches only, see :meth:`extract`."""
        return False

    def trim(self, n: int) -> int:
        """Take nothing back."""
        return 0

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """Return the mask for dense layers: see :meth:`SparseKVCache.make_mask`."""
        return self._held[0].cache.make_mask(N, return_array, window_size)
