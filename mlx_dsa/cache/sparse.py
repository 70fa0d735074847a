"""What the caches of sparse layers have in common, under mlx-lm's cache contract."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..ops import write_rows
from .callers import find_caller
from .foreign import SAVE_WITH, marked, unmarked
from .prompt import PromptPhase


class SparseKVCache:
    """Hold keys, values and index keys of tokens.

    It follows mlx-lm's cache contract (``offset``, ``size``, ``state``,
    ``make_mask``, ``trim``), with :meth:`append` in place of
    ``update_and_fetch``, since an entry has an index key too. A slot is a place
    in the cache; here it equals the position of its token.

    Attributes:
        evicts (bool): Whether entries beyond a budget are dropped for good.
        recalls (bool): Whether entries go to a cold store and come back.
        prompt (PromptPhase): Whether the calls that it sees are of a prompt.
        companion (Any): What a rule of selecting has built over the first entries, or
          ``None``. It is told of entries that are taken back (``trim(size)``), and no
          copy of the cache has it.
        merge (callable): Where a patch gives it: from caches of one layer to the rows of a
          batch; mlx-lm batches what has it.
    """

    step = 256
    evicts = recalls = False
    companion: Any = None
    merge: Callable[[Sequence[Any]], Any]
    _saves_memory: str

    def __init__(self):
        self.reset()

    def reset(self):
        """Empty the cache."""
        self.offset = 0
        self._size = 0
        self._buffers: list[mx.array] | None = None
        self.companion = None
        self.prompt = PromptPhase()

    @property
    def number(self) -> int:
        """What the next token's key is rotated by: its position, unless what is kept has
        been numbered anew."""
        return self.offset

    @property
    def keys(self) -> mx.array | None:
        """Keys ``[B, Hkv, size, D]``, rotated; ``None`` when empty."""
        return self._fetch(0)

    @property
    def values(self) -> mx.array | None:
        """Values ``[B, Hkv, size, D]``; ``None`` when empty."""
        return self._fetch(1)

    @property
    def index_keys(self) -> mx.array | None:
        """What the rule of selecting keeps of tokens ``[B, 1, size, Di]``, such as index
        keys; ``None`` when empty, and where it keeps nothing. Those of a budget's latest
        steps may still be to be made: see ``settle``."""
        return self._fetch(2)

    @property
    def positions(self) -> mx.array | None:
        """Positions of the entries ``[B, size]``, int32; ``None`` when empty."""
        if self._buffers is None:
            return None
        B = self._buffers[0].shape[0]
        return mx.broadcast_to(mx.arange(self._size, dtype=mx.int32), (B, self._size))

    def append(self, *entries: mx.array | None):
        """Add entries after those there are.

        Args:
            *entries (mx.array): Keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, D]``
              and index keys ``[B, 1, L, Di]``, or ``None``.
        """
        L = entries[0].shape[2]
        if self._buffers is None or self._size + L > self._buffers[0].shape[2]:
            self._grow(entries)
        else:
            for buffer, new in zip(self._buffers, entries):
                if new is not None:
                    buffer[..., self._size : self._size + L, :] = new
        self._tie(*self._buffers[2:])
        self._size += L
        self.offset += L

    def settle(self, project: Callable[[mx.array, int], Sequence[mx.array]]):
        """Make what the entries of the latest steps still lack: here nothing."""

    def sort(self):
        """Put the slots in the order of their positions: here they are."""

    def asks(self) -> bool:
        """Return whether a prompt's last token is there, for which cold entries come back."""
        return False

    def end_stream(self):
        """Go on without cuts, as for decode."""

    def write_values(self, slots: mx.array, values: mx.array):
        """Overwrite values of entries.

        Args:
            slots (mx.array): Their slots ``[B, n]``, int32.
            values (mx.array): ``[B, Hkv, n, D]``.
        """
        self._buffers[1] = write_rows(self._buffers[1], values, slots, axis=2)

    def _fetch(self, i: int) -> mx.array | None:
        if self._buffers is None:
            return None
        buffer = self._buffers[i]
        if buffer is None or buffer.shape[2] == self._size:
            return buffer
        return buffer[..., : self._size, :]

    def _grow(self, entries: Sequence[mx.array]):
        """Copy what there is into more room, the new entries after it."""
        n = self._size + entries[0].shape[2]
        spare = self._room(n, entries[0].shape[2]) - n
        buffers: list[mx.array] = []
        for i, new in enumerate(entries):
            if new is None:
                buffers.append(None)
                continue
            parts = [new] if self._buffers is None else [self._fetch(i), new]
            parts.append(mx.zeros((*new.shape[:2], spare, new.shape[3]), new.dtype))
            buffers.append(mx.concatenate(parts, axis=2))
        self._buffers = buffers

    def _room(self, n: int, L: int) -> int:
        """Return for how many entries room is made, the new ``L`` of ``n`` among them."""
        return n - L + -(-L // self.step) * self.step

    def _tie(self, *arrays: mx.array | None):
        # What no output of this step depends on would pile up as a graph without bound.
        there = [a for a in arrays if a is not None]
        if there:
            self._buffers[0] = mx.depends(self._buffers[0], there)

    # mlx-lm's contract from here on.

    def size(self) -> int:
        """Return the number of entries kept."""
        return self._size

    def empty(self) -> bool:
        """Return whether there are no entries."""
        return self._buffers is None

    @property
    def nbytes(self) -> int:
        """Bytes of all entries' keys, values and index keys, as allocated."""
        return sum(b.nbytes for b in self._buffers or () if b is not None)

    @property
    def contents(self) -> list[Any]:
        """What a copy needs: arrays, whole numbers and ``None``."""
        entries = [self.keys, self.values, self.index_keys, self.offset]
        return snapshot([*entries, self.prompt.code])

    @contents.setter
    def contents(self, contents: Sequence[Any]):
        keys, values, index_keys, self.offset, prompt = snapshot(contents)
        self.prompt = PromptPhase.from_code(prompt, getattr(self, "prompt", None))
        self._buffers = None if keys is None else [keys, values, index_keys]
        self.companion = None
        self._size = self.offset

    def copy(self) -> SparseKVCache:
        """Return a cache that goes on by itself from where this one is."""
        other = copy.copy(self)
        other.prompt = copy.deepcopy(self.prompt)
        other.contents = self.contents
        return other

    @property
    def state(self) -> list[Any]:
        """The contents, for mlx-lm, which reads them while a prompt goes on, and can
        evaluate and copy them but not save them."""
        self.prompt.state_was_read()
        return marked(self.contents)

    @state.setter
    def state(self, state: Sequence[Any]):
        self.contents = unmarked(state)

    @property
    def meta_state(self):
        """Refuse ``save_prompt_cache`` of mlx-lm before 0.32, which alone asks for it."""
        raise ValueError(f"[{type(self).__name__}] {SAVE_WITH}.")

    @classmethod
    def from_state(cls, state: Sequence[Any]):
        """Build a cache from another one's ``state``."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def is_trimmable(self) -> bool:
        """Return whether the newest tokens can be taken back.

        Raises:
            ValueError: If speculative decoding asks. Its calls of several tokens can't be
                told from a prompt's, which are never evicted from.
        """
        if find_caller("mlx_lm.generate", "speculative_generate_step"):
            raise ValueError(
                f"[{type(self).__name__}] speculative decoding is not supported on a "
                f"patched model. Leave draft_model out, or restore() the patch."
            )
        return self._is_trimmable()

    def _is_trimmable(self) -> bool:
        return True

    @property
    def trimmable(self) -> int:
        """How many of the newest tokens :meth:`trim` can take back."""
        return self.offset if self._is_trimmable() else 0

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; return how many were."""
        n = min(self._size, n) if self._is_trimmable() else 0
        self._size -= n
        self.offset -= n
        if n:
            self.prompt.reopen()
            if self.companion is not None:
                self.companion.trim(self._size)
        return n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """Return the mask for dense layers of the same model.

        mlx-lm builds one mask from the first layer's cache for all layers. Only
        ``"causal"`` (aligned to the lower right) is right for caches that differ in
        length, so an array is refused. Sparse layers don't read it.
        """
        if return_array or window_size is not None:
            raise ValueError(
                f"[{type(self).__name__}] a mask array can't fit layers whose caches "
                f"differ in length. Call the model without a window."
            )
        return None if N == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Refuse: a dense layer has no index key to store."""
        raise ValueError(
            f"[{type(self).__name__}] belongs to a patched model, and this layer is "
            f"dense. Make a new cache with make_prompt_cache(model)."
        )

    @property
    def to_quantized(self):
        """Refuse ``kv_bits``; mlx-lm asks for this attribute when it is set."""
        raise ValueError(
            f"[{type(self).__name__}] kv_bits is not supported on a patched model. Leave it out; {self._saves_memory}."
        )


def snapshot(state: Sequence[Any]) -> list[Any]:
    """Return a state that a cache's writes in place don't reach, and no copy."""
    return [a[...] if isinstance(a, mx.array) else a for a in state]
