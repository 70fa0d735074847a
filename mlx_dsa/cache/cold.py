"""Entries that attention does not read at present, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import mlx.core as mx

from ..ops import gather_rows

_STEP = 256
# Of a quantised row: MLX's smallest group.
_GROUP = 32


class MemoryStore:
    """Keep rows in memory, quantised to 4 or 8 bits, or as they are.

    A row is the key or the value of one token at one KV head. Rows are added in
    the order of their positions and are never changed.

    Args:
        bits (int): 4, 8, or 16 for rows as they are.
    """

    def __init__(self, bits: int):
        self.bits = bits
        self.size = 0
        self._buffers: list[mx.array] = []
        self._head_dim = 0
        self._dtype: mx.Dtype | None = None

    def append(self, rows: Sequence[mx.array]):
        """Add rows of the next tokens.

        Args:
            rows (sequence of mx.array): Keys and values ``[B, Hkv, L, D]``.
        """
        L, self._head_dim = rows[0].shape[2:]
        self._dtype = rows[0].dtype
        packed = [part for row in rows for part in self._pack(row)]
        self._buffers = self._write(packed, L)
        self.size += L

    def copy(self, arrays: Sequence[mx.array]) -> MemoryStore:
        """Return a store like this one that holds other arrays, such as some batch rows."""
        store = copy.copy(self)
        # New handles: a store writes into its buffers in place.
        store._buffers = [a[...] for a in arrays]
        return store

    def __deepcopy__(self, memo: dict) -> MemoryStore:
        return self.copy(self._buffers)

    @property
    def is_exact(self) -> bool:
        """Whether rows come back as they were."""
        return self.bits == 16

    def fetch(self, slots: mx.array, missing: mx.array) -> list[mx.array]:
        """Take rows back.

        Args:
            slots (mx.array): Positions ``[B, N]``, int32.
            missing (mx.array): Where a row is wanted ``[B, N]``, bool; others may
              hold anything.

        Returns:
            list: Keys and values ``[B, Hkv, N, D]``.
        """
        return self._unpack([gather_rows(b, slots) for b in self._rows()])

    def fetch_all(self) -> list[mx.array]:
        """Return all keys and values ``[B, Hkv, size, D]``."""
        return self._unpack(self._rows())

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token's entry takes, over the batch."""
        return sum(b[:, :, :1].nbytes for b in self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, as allocated."""
        return sum(b.nbytes for b in self._buffers)

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that must be evaluated for the rows to be there."""
        return self._buffers

    def _rows(self) -> list[mx.array]:
        return [b[:, :, : self.size] for b in self._buffers]

    def _write(self, packed: list[mx.array], L: int) -> list[mx.array]:
        buffers = self._buffers
        if not buffers or self.size + L > buffers[0].shape[2]:
            extra = (_STEP + L - 1) // _STEP * _STEP
            blocks = [mx.zeros((*p.shape[:2], extra, p.shape[3]), p.dtype) for p in packed]
            buffers = [
                mx.concatenate([old, new], axis=2) if old is not None else new
                for old, new in zip(self._rows() or [None] * len(blocks), blocks)
            ]
        for buffer, part in zip(buffers, packed):
            buffer[:, :, self.size : self.size + L] = part
        return buffers

    def _pack(self, row: mx.array) -> list[mx.array]:
        if self.is_exact:
            return [row]
        missing = -self._head_dim % _GROUP
        if missing:  # the last number again: the range of its group stays what it is
            row = mx.pad(row, [(0, 0)] * 3 + [(0, missing)], mode="edge")
        return list(mx.quantize(row, group_size=self._group_size, bits=self.bits))

    def _unpack(self, parts: list[mx.array]) -> list[mx.array]:
        if self.is_exact:
            return parts
        size, bits = self._group_size, self.bits
        rows = (mx.dequantize(w, s, b, group_size=size, bits=bits) for w, s, b in (parts[:3], parts[3:]))
        return [row[..., : self._head_dim].astype(self._dtype) for row in rows]

    @property
    def _group_size(self) -> int:
        return 64 if self._head_dim % 64 == 0 else _GROUP
