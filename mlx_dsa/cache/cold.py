"""Stores for entries that attention does not read at present."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops import gather_rows

_STEP = 256


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
        self._dtype = None

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
        store._buffers = list(arrays)
        return store

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
        if self.bits == 16:
            return [row]
        return list(mx.quantize(row, group_size=self._group_size, bits=self.bits))

    def _unpack(self, parts: list[mx.array]) -> list[mx.array]:
        if self.bits == 16:
            return parts
        return [
            mx.dequantize(
                *parts[i : i + 3], group_size=self._group_size, bits=self.bits
            ).astype(self._dtype)
            for i in (0, 3)
        ]

    @property
    def _group_size(self) -> int:
        return 64 if self._head_dim % 64 == 0 else 32


class FileStore:
    """Keep rows in a region of a memory-mapped file, as they are.

    Reading and writing wait for the device: a file can't be part of a graph.

    Args:
        path (str or PathLike): The file, which must exist.
        begin (int): First byte of the region, a multiple of the page size.
    """

    def __init__(self, path: str | os.PathLike, begin: int):
        self.path = path
        self.begin = begin
        self.size = 0
        self._dtype = None
        self._file: Any = None

    def append(self, rows: Sequence[mx.array]):
        """Add rows of the next tokens: see :meth:`MemoryStore.append`."""
        self._dtype = rows[0].dtype
        # [L, 2, B, Hkv, D]: what belongs to one token lies together.
        block = mx.stack(list(rows)).transpose(3, 0, 1, 2, 4)
        block = np.array(block.view(_bits_of(self._dtype)))
        row = block.shape[1:]
        with open(self.path, "r+b") as file:
            file.seek(self.begin + self.size * block[0].nbytes)
            file.write(block.tobytes())
        self.size += block.shape[0]
        self._file = np.memmap(
            self.path, block.dtype, "r", self.begin, shape=(self.size, *row)
        )

    def copy(self, arrays: Sequence[mx.array]) -> FileStore:
        """Refuse: two copies would write to one place."""
        raise ValueError(
            "[FileStore] a cache whose cold entries are in a file can't be copied. Keep "
            "them in memory: cold_bits=16."
        )

    def fetch(self, slots: mx.array, missing: mx.array) -> list[mx.array]:
        """Take rows back: see :meth:`MemoryStore.fetch`."""
        at, wanted = np.array(slots), np.array(missing)
        rows = np.zeros((at.shape[1], *self._file.shape[1:]), self._file.dtype)
        for b in range(at.shape[0]):
            rows[wanted[b], :, b] = self._file[at[b][wanted[b]], :, b]
        return self._to_arrays(rows)

    def fetch_all(self) -> list[mx.array]:
        """Return all keys and values ``[B, Hkv, size, D]``."""
        return self._to_arrays(np.array(self._file))

    @property
    def token_nbytes(self) -> int:
        """Bytes in the file that one token's entry takes, over the batch."""
        return 0 if self._file is None else self._file[:1].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes in memory: none."""
        return 0

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that must be evaluated: nothing."""
        return []

    def _to_arrays(self, rows: np.ndarray) -> list[mx.array]:
        both = mx.array(rows).view(self._dtype).transpose(1, 2, 3, 0, 4)
        return [both[0], both[1]]


def _bits_of(dtype: mx.Dtype) -> mx.Dtype:
    return mx.uint16 if dtype.size == 2 else mx.uint32
