"""Entries that attention does not read at present, in a file."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files import HeldFile

# What a cold file begins with: one of ours, not a user's.
_MARK = b"mlx-dsa cold file\n"
# Tokens of a block, and bytes before the first block.
_BLOCK_ROWS, _HEADER = 64, 4096


def claim(path: Path) -> HeldFile:
    """Make a new cold file, in place of one that a killed process left.

    Args:
        path (Path): Where.

    Raises:
        ValueError: If it is in use, not one of ours, or can't be made.
    """
    try:
        return HeldFile(path, _MARK)
    except BlockingIOError:
        raise ValueError(f"[SparsePatch] 'cold_file' {path} is in use by another run. Name another file.") from None
    except FileExistsError:
        raise ValueError(
            f"[SparsePatch] 'cold_file' {path} exists and is not overwritten. Name a new file, or delete it."
        ) from None
    except OSError as error:
        raise ValueError(f"[SparsePatch] 'cold_file' {path} can't be made: {error.strerror}.") from None


class ColdFile:
    """Blocks of one file, which the cold stores of all layers and conversations share.

    A block belongs to whoever holds it, and is used again when nobody does.

    Args:
        path (str or PathLike): The file, which must exist. Its first 4,096 bytes are
          left alone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._end = _HEADER
        self._free: dict[int, list[int]] = {}  # size -> where
        self._lock = threading.RLock()  # a block may go while another is taken
        self._bytes: np.ndarray | None = None

    def block(self, nbytes: int, align: int) -> _Block:
        """Return a block of ``nbytes`` that begins at a multiple of ``align``."""
        with self._lock:
            at = next((b for b in self._free.get(nbytes, ()) if b % align == 0), None)
            if at is None:
                at = -(-self._end // align) * align
                self._end = at + nbytes
            else:
                self._free[nbytes].remove(at)
        return _Block(self, at, nbytes)

    def release(self, block: _Block):
        """Take a block back."""
        with self._lock:
            self._free.setdefault(block.nbytes, []).append(block.begin)

    def write(self, at: int, rows: np.ndarray):
        """Write rows at a byte.

        Raises:
            ValueError: If the file can't hold them.
        """
        try:
            with self._lock, open(self.path, "r+b", buffering=0) as file:
                file.seek(at)
                view = rows.reshape(-1).view(np.uint8).data
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise ValueError(
                f"[FileStore] the cold file {self.path} can't be written: "
                f"{error.strerror}. Free some space, or leave cold_file out."
            ) from None

    def rows(self, row_nbytes: int) -> np.ndarray:
        """Return the file as rows ``[n, row_nbytes]`` of bytes."""
        with self._lock:
            if self._bytes is None or self._bytes.size < self._end:
                # What is not written yet must lie in the file to be mapped.
                with open(self.path, "r+b") as file:
                    if file.seek(0, os.SEEK_END) < self._end:
                        file.truncate(self._end)
                self._bytes = np.memmap(self.path, np.uint8, "r")
            mapped = self._bytes
        n = mapped.size // row_nbytes
        return mapped[: n * row_nbytes].reshape(n, row_nbytes)


class _Block:
    """A part of a :class:`ColdFile`, given back when nothing refers to it."""

    def __init__(self, file: ColdFile, begin: int, nbytes: int):
        self.file, self.begin, self.nbytes = file, begin, nbytes

    def __del__(self):
        self.file.release(self)


class FileStore:
    """Keep rows in blocks of a memory-mapped file, as they are.

    Reading and writing wait for the device: a file can't be part of a graph.

    Args:
        file (ColdFile): Where.
    """

    is_exact = True

    def __init__(self, file: ColdFile):
        self.size = 0
        self._file = file
        self._blocks: list[_Block] = []
        self._owns_last = True  # no copy writes to the last block
        self._row: tuple[int, ...] = ()
        self._dtype: mx.Dtype | None = None
        self._bits: np.dtype | None = None

    def append(self, rows: Sequence[mx.array]):
        """Add rows of the next tokens: see :meth:`MemoryStore.append`."""
        self._dtype = rows[0].dtype
        # [L, 2, B, Hkv, D]: what belongs to one token lies together.
        block = mx.stack(list(rows)).transpose(3, 0, 1, 2, 4)
        block = np.array(block.view(_bits_of(self._dtype)))
        self._row, self._bits = block.shape[1:], block.dtype
        while len(block):
            used = self.size % _BLOCK_ROWS
            if not used:
                self._blocks.append(self._new_block())
                self._owns_last = True
            elif not self._owns_last:
                self._own_last(used)
            n = min(len(block), _BLOCK_ROWS - used)
            at = self._blocks[-1].begin + used * self.token_nbytes
            self._file.write(at, block[:n])
            self.size += n
            block = block[n:]

    def _new_block(self) -> _Block:
        row = self.token_nbytes
        return self._file.block(_BLOCK_ROWS * row, row)

    def _own_last(self, used: int):
        mine = self._new_block()
        self._file.write(mine.begin, self._read(np.arange(self.size - used, self.size)))
        self._blocks[-1] = mine
        self._owns_last = True

    def copy(self, arrays: Sequence[mx.array]) -> FileStore:
        """Return a store that goes on by itself: of the same rows, or of some of the batch.

        Args:
            arrays (sequence of mx.array): :attr:`arrays`, or of some batch rows.
        """
        if arrays and arrays[0].tolist() != self.arrays[0].tolist():
            store, rows = FileStore(self._file), arrays[0][:, 0]
            store.append([entries[rows] for entries in self.fetch_all()])
            return store
        store = copy.copy(self)
        store._blocks = list(self._blocks)
        self._owns_last = store._owns_last = False
        return store

    def __deepcopy__(self, memo: dict) -> FileStore:
        return self.copy(self.arrays)

    def fetch(self, slots: mx.array, missing: mx.array) -> list[mx.array]:
        """Take rows back: see :meth:`MemoryStore.fetch`."""
        at, wanted = np.array(slots), np.array(missing)
        rows = np.zeros((at.shape[1], *self._row), self._bits)
        for b in range(at.shape[0]):
            rows[wanted[b], :, b] = self._read(at[b][wanted[b]])[:, :, b]
        return self._to_arrays(rows)

    def fetch_all(self) -> list[mx.array]:
        """Return all keys and values ``[B, Hkv, size, D]``."""
        return self._to_arrays(self._read(np.arange(self.size)))

    def _read(self, positions: np.ndarray) -> np.ndarray:
        row = self.token_nbytes
        first = np.array([block.begin // row for block in self._blocks])
        at = first[positions // _BLOCK_ROWS] + positions % _BLOCK_ROWS
        rows = self._file.rows(row)[at]
        return rows.view(self._bits).reshape(len(positions), *self._row)

    @property
    def token_nbytes(self) -> int:
        """Bytes in the file that one token's entry takes, over the batch."""
        return 0 if self._bits is None else math.prod(self._row) * self._bits.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in memory: none."""
        return 0

    @property
    def arrays(self) -> list[mx.array]:
        """The batch rows ``[B, 1]``: the entries themselves are in the file."""
        return [mx.arange(self._row[1])[:, None]] if self._row else []

    def _to_arrays(self, rows: np.ndarray) -> list[mx.array]:
        both = mx.array(rows).view(self._dtype).transpose(1, 2, 3, 0, 4)
        return [both[0], both[1]]


def _bits_of(dtype: mx.Dtype) -> mx.Dtype:
    return mx.uint16 if dtype.size == 2 else mx.uint32
