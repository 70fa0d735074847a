"""What two tiers have at hand while a prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .budget import BudgetKVCache


class Reader(BudgetKVCache):
    """A budget cache that begins with entries.

    Args:
        budget (int): Entries that a cut leaves.
        phase (int): As of a :class:`BudgetKVCache`.
        offset (int): Tokens seen. Default: ``0``.
        entries (sequence of mx.array, optional): What :meth:`append` would have been given,
          in the order of their positions. Default: ``None``, no entries.
        positions (mx.array, optional): Theirs ``[B, size]``, int32, ascending.
          Default: ``None``, from 0 on.
    """

    def __init__(
        self,
        budget: int,
        phase: int,
        offset: int = 0,
        entries: Sequence[mx.array] | None = None,
        positions: mx.array | None = None,
    ):
        super().__init__(budget, phase)
        self.offset = offset
        if entries is not None:
            self._buffers = list(entries)
            self._size = entries[0].shape[2]
            self._positions = positions

    def tie(self, arrays: Sequence[mx.array]):
        """Have arrays made together with the keys."""
        self._tie(*arrays)
