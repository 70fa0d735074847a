"""A KV cache that reads top_k entries a step and loses none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..ops import gather_rows
from .budget import BudgetKVCache
from .callers import find_caller
from .cold import MemoryStore
from .cold_file import FileStore
from .full import FullKVCache
from .prompt import PromptPhase
from .reader import Reader
from .sparse import SparseKVCache, snapshot


class TieredKVCache(SparseKVCache):
    """Keep the entries that attention reads at hand, and all others cold.

    A prompt is read as with a full cache. When it ends, every entry goes to the
    cold store, and the ``budget`` entries selected last stay hot, as they are.
    From then on each new entry is hot and cold; :meth:`recall` makes a selection
    hot. Index keys of all tokens stay in memory: they say what to recall.

    A prompt that is cut while it is read is read by what :meth:`begin_stream` returns:
    entries are hot until a cut, before which :meth:`store` writes them to the cold store.
    Scores of a retention head, which cuts may need, stay in memory as index keys do.

    Args:
        budget (int): Hot entries.
        make_store (callable): Makes an empty cold store.
        phase (int): As of a :class:`BudgetKVCache`. Default: ``0``.
    """

    recalls = True
    _saves_memory = "for less memory use cold_bits=4, or cold_file"

    def __init__(
        self,
        budget: int,
        make_store: Callable[[], MemoryStore | FileStore],
        phase: int = 0,
    ):
        self.budget = budget
        self._make_store = make_store
        self._phase = phase
        super().__init__()

    def reset(self):
        """Empty the cache."""
        super().reset()
        self.cold = self._make_store()
        self._hot: list[mx.array] | None = None
        self._slots_in_hot: mx.array | None = None  # [B, capacity], -1: not hot
        self._reader: Reader | None = None  # has the hot entries while a prompt is cut
        self._recalled = mx.array(0)
        self.n_selections = 0  # since the split

    @property
    def split(self) -> bool:
        """Whether entries have gone to the cold store."""
        return self.cold.size > 0

    @property
    def recalls_exactly(self) -> bool:
        """Whether what comes back from the cold store is what went there."""
        return self.split and self.cold.is_exact

    @property
    def recalled(self) -> int:
        """Entries brought back from the cold store since the split, over the batch."""
        return int(self._recalled)

    def append(self, *entries: mx.array):
        """Add entries after those there are: see :meth:`SparseKVCache.append`.

        Args:
            *entries (mx.array): As there, and for cuts by a retention head its scores,
              twice, ``[B, 1, L, 2]`` in float32.
        """
        keys, values, *others = entries
        # Once is enough here: the second is for what a cut makes of them.
        others[1:] = [scores[..., :1] for scores in others[1:]]
        if self._reader is not None:
            self._reader.append(*entries)
        elif not self.split:
            super().append(keys, values, *others)
            return
        else:
            self.cold.append((keys, values))
            L = keys.shape[2]
            n_hot = self._hot[0].shape[2]
            # What has just been read stays hot until a selection leaves it out.
            self._hot = [mx.concatenate([hot, new], axis=2) for hot, new in zip(self._hot, entries)]
            self._grow_map(L)
            self._slots_in_hot[:, self._size : self._size + L] = mx.arange(n_hot, n_hot + L, dtype=mx.int32)
        super().append(*(e[:, :, :, :0] for e in (keys, values)), *others)
        if self._reader is not None:
            self._reader.tie(self._buffers)

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
        self._hot = [mx.where(missing[:, None, :, None], c, h) for c, h in zip(cold, hot)]
        self._recalled = self._recalled + missing.sum()
        self.n_selections += 1
        self._map(slots)
        self._tie_all()
        return self._hot

    def _split(self, slots: mx.array):
        keys, values = self._fetch(0), self._fetch(1)
        self.cold.append((keys, values))
        self._hot = [gather_rows(x, slots) for x in (keys, values)]
        self._empty_buffers()
        self._map(slots)
        self._tie_all()

    def _empty_buffers(self):
        self._buffers[:2] = [x[:, :, :, :0] for x in self._buffers[:2]]

    def _map(self, slots: mx.array):
        B, n_hot = slots.shape
        capacity = self._buffers[2].shape[2]
        places = mx.broadcast_to(mx.arange(n_hot, dtype=mx.int32), (B, n_hot))
        self._slots_in_hot = mx.put_along_axis(mx.full((B, capacity), -1, mx.int32), slots, places, axis=1)

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
                *(*self._buffers, *self.cold.arrays),
            ],
        )

    # A prompt that is cut while it is read.

    def begin_stream(self) -> BudgetKVCache:
        """Return the hot entries as a budget cache, to be cut; what is appended here comes
        to it, until :meth:`end_stream`."""
        if self._reader is None:
            entries = positions = None
            if not self.empty():
                entries, positions = self._at_hand()
                self._empty_buffers()
            self._reader = Reader(self.budget, self._phase, self.offset, entries, positions)
            self._hot = self._slots_in_hot = None
        return self._reader

    def _at_hand(self) -> tuple[list[mx.array], mx.array | None]:
        others = [self._fetch(i) for i in range(2, len(self._buffers))]
        entries, positions = [self._fetch(0), self._fetch(1)], None
        if self.split:
            entries, positions = self._hot, self.hot_positions
            others = [gather_rows(x, positions) for x in others]
        for scores in others[1:]:
            others[1:] = [mx.broadcast_to(scores, (*scores.shape[:3], 2))]
        return [*entries, *others], positions

    def store(self):
        """Write to the cold store what is not there yet, before a cut."""
        n = self.offset - self.cold.size
        if n:
            self.cold.append([x[:, :, -n:] for x in (self._reader.keys, self._reader.values)])
            self._reader.tie(self.cold.arrays)

    def end_stream(self):
        """Go on without cuts, as for decode; where there was none, nothing is cold."""
        reader = self._reader
        if reader is None:
            return
        if self.split:
            self.store()
            self._hot = [reader.keys, reader.values]
            self._map(reader.positions)
        elif not reader.empty():
            others = [self._fetch(i) for i in range(2, len(self._buffers))]
            self._buffers = [reader.keys, reader.values, *others]
        self._reader = None
        if self.split:
            self._tie_all()

    def asks(self) -> bool:
        """Return whether the call of one token that the prompt's phase has just seen ends a
        prompt, as far as is known, and something is cold."""
        if not (self.split and self.prompt.ended):
            return False
        # mlx-lm's own loop over a prompt may call with one token, too.
        caller = find_caller("mlx_lm.generate", "_step", "generate_step")
        return caller is None or caller.f_code.co_name == "_step"

    @property
    def hot_positions(self) -> mx.array | None:
        """Positions of the entries at hand ``[B, n]``, int32, ascending; ``None`` when empty."""
        if self._reader is not None:
            return self._reader.positions
        if not self.split:
            return self.positions
        n_hot = self._hot[0].shape[2]
        at = self._slots_in_hot[:, : self._size]
        # They lie in this order, too.
        order = mx.argsort(mx.where(at < 0, n_hot, at), axis=1)
        return order[:, :n_hot].astype(mx.int32)

    @property
    def keys(self) -> mx.array | None:
        """Keys at hand ``[B, Hkv, n, D]``; ``None`` when empty."""
        return self._hot_entries()[0]

    @property
    def values(self) -> mx.array | None:
        """Values at hand, likewise."""
        return self._hot_entries()[1]

    def _hot_entries(self) -> list[mx.array | None]:
        if self._reader is not None:
            return [self._reader.keys, self._reader.values]
        return self._hot if self.split else [self._fetch(0), self._fetch(1)]

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
        held = dict(zip(("keys", "values", "index_keys"), everything))
        full.contents = {**held, "offset": self._size, "prompt": 0}
        return full

    @property
    def hot_nbytes(self) -> int:
        """Bytes of the keys and values that attention reads."""
        hot = self._hot if self.split else (self._buffers or ())[:2]
        if self._reader is not None:
            hot = [x for x in self._hot_entries() if x is not None]
        return sum(a.nbytes for a in hot)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: hot and cold entries, index keys and the map."""
        if self._reader is not None:
            return super().nbytes + self._reader.nbytes + self.cold.nbytes
        if not self.split:
            return super().nbytes
        return self.hot_nbytes + self.cold.nbytes + sum(b.nbytes for b in self._buffers[2:]) + self._slots_in_hot.nbytes

    @property
    def contents(self) -> dict[str, Any]:
        """What a copy needs, by name; where something is cold or may soon be, with its store."""
        held: dict[str, Any] = {"index_keys": self.index_keys, "offset": self.offset, "prompt": self.prompt.code}
        held["scores"] = self._fetch(3) if self._buffers and len(self._buffers) > 3 else None
        if self._reader is None:
            held["keys"], held["values"] = self._hot_entries()
        if self._reader is not None or self.split:
            held |= {"slots_in_hot": self._slots_in_hot, "recalled": self._recalled}
            held |= {f"cold.{i}": a for i, a in enumerate(self.cold.arrays)}
        reader = {} if self._reader is None else self._reader.contents
        return snapshot(held | {f"reader.{name}": value for name, value in reader.items()})

    @contents.setter
    def contents(self, contents: Mapping[str, Any]):
        store, before = self.cold, self.prompt
        self.reset()
        self.offset = self._size = contents["offset"]
        self.prompt = PromptPhase.from_code(contents["prompt"], before)
        others = [x for x in (contents["index_keys"], contents["scores"]) if x is not None]
        hot = [contents.get("keys"), contents.get("values")]
        if "recalled" not in contents:
            self._buffers = [*hot, *others] if others else None
            return
        self._slots_in_hot, self._recalled = contents["slots_in_hot"], contents["recalled"]
        cold = [value for name, value in contents.items() if name.startswith("cold.")]
        self.cold = store.copy(cold) if cold else self.cold
        of_reader = {n.removeprefix("reader."): v for n, v in contents.items() if n.startswith("reader.")}
        if of_reader:
            self._reader = Reader(self.budget, self._phase)
            self._reader.contents = of_reader
            hot = [self._reader.keys]
        else:
            self._hot = hot
        if others:
            nothing = mx.zeros((*hot[0].shape[:2], self._size, 0), hot[0].dtype)
            self._buffers = [nothing, nothing, *others]

    @classmethod
    def from_state(cls, state):
        """Refuse: what is cold belongs to its store."""
        raise ValueError("[TieredKVCache] can't be rebuilt from a state. Save a 'budget' or 'full' cache instead.")

    def _is_trimmable(self) -> bool:
        return not self.split

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; return how many were."""
        n = super().trim(n)
        if self._reader is not None:
            self._reader.trim(n)
        return n
