"""A KV cache that reads top_k entries a step and loses none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..ops import gather_rows
from .cold import MemoryStore
from .cold_file import FileStore
from .full import FullKVCache
from .prompt import PromptPhase


class TieredKVCache(FullKVCache):
    """Keep the entries that attention reads at hand, and all others cold.

    A prompt is read as with a full cache. When it ends, every entry goes to the
    cold store, and the ``budget`` entries selected last stay hot, as they are.
    From then on each new entry is hot and cold; :meth:`recall` makes a selection
    hot. Index keys of all tokens stay in memory: they say what to recall.

    Args:
        budget (int): Hot entries.
        make_store (callable): Makes an empty cold store.
    """

    _saves_memory = "for less memory use cold_bits=4, or cold_file"

    def __init__(self, budget: int, make_store: Callable[[], MemoryStore | FileStore]):
        self.budget = budget
        self._make_store = make_store
        super().__init__()

    def reset(self):
        """Empty the cache."""
        super().reset()
        self.cold = self._make_store()
        self._hot: list[mx.array] | None = None
        self._slots_in_hot: mx.array | None = None  # [B, capacity], -1: not hot
        self._recalled: mx.array | None = None
        self.n_selections = 0  # since the split

    @property
    def split(self) -> bool:
        """Whether entries have gone to the cold store."""
        return self._hot is not None

    @property
    def recalls_exactly(self) -> bool:
        """Whether what comes back from the cold store is what went there."""
        return self.split and self.cold.is_exact

    @property
    def recalled(self) -> int:
        """Entries brought back from the cold store since the split, over the batch."""
        return 0 if self._recalled is None else self._recalled.item()

    def append(self, *entries: mx.array):
        """Add entries after those there are: see :meth:`FullKVCache.append`."""
        if not self.split:
            super().append(*entries)
            return
        keys, values, index_keys = entries
        self.cold.append((keys, values))
        L = keys.shape[2]
        n_hot = self._hot[0].shape[2]
        # What has just been read stays hot until a selection leaves it out.
        self._hot = [
            mx.concatenate([hot, new], axis=2) for hot, new in zip(self._hot, entries)
        ]
        self._grow_map(L)
        self._slots_in_hot[:, self._size : self._size + L] = mx.arange(
            n_hot, n_hot + L, dtype=mx.int32
        )
        super().append(*(e[:, :, :, :0] for e in (keys, values)), index_keys)

    def recall(self, slots: mx.array) -> list[mx.array]:
        """Make a selection hot, and only it.

        Args:
            slots (mx.array): ``[B, budget]``, int32, ascending, none empty.

        Returns:
            list: Keys and values of these slots ``[B, Hkv, budget, D]``.
        """
        if not self.split:
            self._split(slots)
            return self._hot
        at = mx.take_along_axis(self._slots_in_hot, slots, axis=1)
        missing = at < 0
        hot = [gather_rows(h, mx.maximum(at, 0)) for h in self._hot]
        cold = self.cold.fetch(slots, missing)
        self._hot = [
            mx.where(missing[:, None, :, None], c, h) for c, h in zip(cold, hot)
        ]
        self._recalled = self._recalled + missing.sum()
        self.n_selections += 1
        self._map(slots)
        self._tie_all()
        return self._hot

    def _split(self, slots: mx.array):
        keys, values = self._fetch(0), self._fetch(1)
        self.cold.append((keys, values))
        self._hot = [gather_rows(x, slots) for x in (keys, values)]
        self._buffers[:2] = [x[:, :, :, :0] for x in self._buffers[:2]]
        self._recalled = mx.array(0)
        self._map(slots)
        self._tie_all()

    def _map(self, slots: mx.array):
        B, n_hot = slots.shape
        capacity = self._buffers[2].shape[2]
        places = mx.broadcast_to(mx.arange(n_hot, dtype=mx.int32), (B, n_hot))
        self._slots_in_hot = mx.put_along_axis(
            mx.full((B, capacity), -1, mx.int32), slots, places, axis=1
        )

    def _grow_map(self, L: int):
        short = self._size + L - self._slots_in_hot.shape[1]
        if short > 0:
            B = self._slots_in_hot.shape[0]
            more = mx.full((B, short + self.step), -1, mx.int32)
            self._slots_in_hot = mx.concatenate([self._slots_in_hot, more], axis=1)

    def _tie_all(self):
        self._hot[0] = mx.depends(
            self._hot[0],
            [
                *(self._hot[1], self._slots_in_hot, self._recalled),
                *(self._buffers[2], *self.cold.arrays),
            ],
        )

    @property
    def keys(self) -> mx.array | None:
        """Keys at hand ``[B, Hkv, n, D]``; ``None`` when empty."""
        return self._hot[0] if self.split else self._fetch(0)

    @property
    def values(self) -> mx.array | None:
        """Values at hand, likewise."""
        return self._hot[1] if self.split else self._fetch(1)

    def assembled(self) -> FullKVCache:
        """Return a full cache of all entries, for one use: a prompt reads everything."""
        if not self.split:
            everything = [self._fetch(i) for i in range(3)]
        else:
            at = self._slots_in_hot[:, : self._size]
            hot = [gather_rows(h, mx.maximum(at, 0)) for h in self._hot]
            is_hot = (at >= 0)[:, None, :, None]
            cold = self.cold.fetch_all()
            everything = [mx.where(is_hot, h, c) for h, c in zip(hot, cold)]
            everything.append(self._fetch(2))
        full = FullKVCache()
        full.contents = [*everything, self._size, 0]
        return full

    @property
    def hot_nbytes(self) -> int:
        """Bytes of the keys and values that attention reads."""
        hot = self._hot if self.split else (self._buffers or ())[:2]
        return sum(a.nbytes for a in hot)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: hot and cold entries, index keys and the map."""
        if not self.split:
            return super().nbytes
        return (
            self.hot_nbytes
            + self.cold.nbytes
            + self._buffers[2].nbytes
            + self._slots_in_hot.nbytes
        )

    @property
    def contents(self) -> list[Any]:
        """What a copy needs; of one that is split, with its store."""
        if not self.split:
            return super().contents
        at_hand = [*self._hot, self.index_keys, self.offset, self.prompt.code]
        return [*at_hand, self._slots_in_hot, self._recalled, *self.cold.arrays]

    @contents.setter
    def contents(self, contents: Sequence[Any]):
        self._hot = self._slots_in_hot = self._recalled = None
        self.n_selections = 0
        store, self.cold = self.cold, self._make_store()
        if len(contents) == 5:
            FullKVCache.contents.fset(self, contents)
            return
        *hot, index_keys, self.offset, prompt = contents[:5]
        self._slots_in_hot, self._recalled, *arrays = contents[5:]
        self.prompt = PromptPhase.from_code(prompt, getattr(self, "prompt", None))
        self.cold = store.copy(arrays)
        self._hot, self._size = hot, self.offset
        nothing = mx.zeros((*hot[0].shape[:2], self._size, 0), hot[0].dtype)
        self._buffers = [nothing, nothing, index_keys]

    @classmethod
    def from_state(cls, state):
        """Refuse: what is cold belongs to its store."""
        raise ValueError(
            "[TieredKVCache] can't be rebuilt from a state. Save a 'budget' or 'full' "
            "cache instead."
        )

    def _is_trimmable(self) -> bool:
        return not self.split
