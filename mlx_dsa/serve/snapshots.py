"""What was read before, for prompts that begin with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..patch import SparsePatch
from .copies import hold, trimmed
from .snapshot import Snapshot, common_tokens, key_of, usable
from .store import SnapshotStore

# A snapshot that was not cut to its budget yet may be this share of all; larger ones are cut.
_SHARE = 4
# Tokens that make it worth to read a file, or to write one.
_WORTH_A_FILE = 64


class Snapshots:
    """Give each prompt the caches that have read most of it.

    It stands in for mlx-lm's ``LRUPromptCache``, whose hits need caches that can be trimmed to
    any length. All but :meth:`stats` is called by the thread that runs the model.

    Args:
        max_bytes (int): Bytes of all snapshots; those least recently used go. Documents
          are not counted.
        store (SnapshotStore, optional): Where snapshots survive a restart.
          Default: ``None``.
    """

    def __init__(self, max_bytes: int, store: SnapshotStore | None = None):
        self.max_bytes = max_bytes
        self.store = store
        self._patch: SparsePatch | None = None
        self._there: list[Snapshot] = []
        self._documents: dict[int, Snapshot] = {}
        self._names: dict[int, str] = {}  # of documents, by number
        self._reading: dict[bytes, int] = {}  # tokens of documents that are being read
        self._read: dict[int, list[Any]] = {}  # those that were
        self._gone: set[int] = set()  # deleted, whatever is still being answered about them
        self._clock = 0
        self._counts: Counter[str] = Counter()
        # Has a document in memory, by its number, or raises: no model is asked with such a token.
        self.bring: Callable[[int], None] = lambda number: None

    def attach(self, patch: SparsePatch | None):
        """Begin, once the model is loaded.

        Args:
            patch (SparsePatch, optional): Of the model; ``None`` where it is dense, and nothing
              is kept on disk.

        Raises:
            ValueError: If the store's folder can't be used.
        """
        self._patch = patch
        if patch is None:
            self.store = None
        if self.store is not None and patch is not None:
            self.store.attach(patch)

    @property
    def maker(self) -> Mapping[str, Any]:
        """What makes keys and values, where that is known."""
        return self.store.maker if self.store is not None else {}

    def close(self):
        """Wait for what is being written."""
        if self.store is not None:
            self.store.close()

    # What mlx-lm's server asks for.

    def __len__(self) -> int:
        return len(self._there)

    @property
    def nbytes(self) -> int:
        return sum(snapshot.nbytes for snapshot in self._there)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Return how many snapshots of each kind there are, and their bytes."""
        result: dict[str, dict[str, int]] = {}
        for snapshot in list(self._there):
            of = result.setdefault(snapshot.kind, {"n_sequences": 0, "n_bytes": 0})
            of["n_sequences"] += 1
            of["n_bytes"] += snapshot.nbytes
        return result

    def fetch_nearest_cache(self, model: Any, tokens: Sequence[int]) -> tuple[list[Any] | None, list[int]]:
        """Find what was read of a prompt.

        Args:
            model (Any): The key of the model.
            tokens (sequence of int): The prompt.

        Returns:
            tuple: Caches, or ``None``, and the tokens that are still to be read: at least one, which
            mlx-lm needs to begin an answer.
        """
        tokens = list(tokens)
        if tokens and tokens[0] < 0:
            self.bring(tokens[0])
        if key_of(tokens) in self._reading:  # a document is the same whatever was read before
            return None, tokens
        found = self._find(model, np.array(tokens, np.int32)) if len(tokens) > 1 else None
        self._counts["hits" if found else "misses"] += 1
        if not found:
            return None, tokens
        caches, n = found
        self._counts["tokens_reused"] += n
        return caches, tokens[n:]

    def insert_cache(self, model: Any, tokens: Sequence[int], caches: list[Any], *, cache_type: str = "assistant"):
        """Keep caches, which are nobody else's from here on.

        Args:
            model (Any): The key of the model.
            tokens (sequence of int): What they have read.
            caches (list): One cache a layer.
            cache_type (str): What ends there; ``"assistant"`` is the end of an answer.
        """
        # Another document that is being read may begin with all of this one.
        number = self._reading.get(key_of(tokens)) if cache_type == "document" else None
        if number is not None:
            self._cut(caches)
            self._read[number] = caches
            return
        if self._is_of_reading(tokens) or len(tokens) and tokens[0] in self._gone:
            return
        snapshot = Snapshot(model, np.array(tokens, np.int32), caches, cache_type)
        if cache_type == "user":
            snapshot.turn = len(snapshot)
        if len(snapshot) and self.max_bytes > 0:
            self._add(snapshot)
        if cache_type == "assistant":
            self._store_turn(snapshot)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None):
        """Drop snapshots, those least recently used first.

        Args:
            n_sequences (int, optional): How many may stay. Default: ``None``, all.
            n_bytes (int, optional): Of how many bytes. Default: ``None``, any.
        """
        n_bytes = self.max_bytes if n_bytes is None else max(0, n_bytes)
        self._there.sort(key=lambda snapshot: snapshot.used)
        left = self.nbytes
        while self._there and (left > n_bytes or n_sequences is not None and len(self._there) > max(0, n_sequences)):
            gone = self._there.pop(0)
            left -= gone.nbytes
            self._counts["evictions"] += 1
            if gone.turn:
                self._store(gone)

    def stats(self) -> dict[str, int]:
        """Return what ``/metrics`` tells."""
        documents = list(self._documents.values())
        return {
            **{name: self._counts[name] for name in ("hits", "misses", "tokens_reused", "evictions", "loaded")},
            "snapshots": len(self._there),
            "bytes": self.nbytes,
            "documents_in_memory": len(documents),
            "documents_bytes": sum(document.nbytes for document in documents),
            "stored_bytes": self.store.nbytes if self.store is not None else 0,
        }

    # What documents ask for.

    def begin_document(self, tokens: Sequence[int], n: int, number: int):
        """Expect a document in :meth:`insert_cache`, of kind ``"document"``.

        Args:
            tokens (sequence of int): The prompt by which it is read.
            n (int): How many of them are the document's.
            number (int): The document's, negative.
        """
        self._reading[key_of(tokens[:n])] = self._reading[key_of(tokens)] = number

    def end_document(self, number: int) -> list[Any] | None:
        """Return a document's caches, ``None`` where it was not read to its end; expect it no more."""
        self._reading = {key: other for key, other in self._reading.items() if other != number}
        return self._read.pop(number, None)

    def name(self, number: int, name: str):
        """Say what a document is called on disk."""
        self._names[number] = name

    def pin(self, number: int, tokens: Sequence[int], caches: list[Any]):
        """Keep a document in memory until :meth:`unpin`.

        Args:
            number (int): What prompts begin with that ask it, in place of its first token.
            tokens (sequence of int): Its tokens.
            caches (list): One cache a layer, cut to their budget.
        """
        document = Snapshot(None, np.array([number, *tokens[1:]], np.int32), caches, "document")
        document.measure()
        self._documents[number] = document
        self._touch(document)

    def unpin(self, number: int, forget: bool = False):
        """Keep a document no longer in memory.

        Args:
            number (int): The document's.
            forget (bool): Whether all conversations about it go, too. Default: ``False``.
        """
        self._documents.pop(number, None)
        if forget:
            self._gone.add(number)
            self._there = [snapshot for snapshot in self._there if snapshot.tokens[0] != number]
            name = self._names.pop(number, None)
            if self.store is not None and name is not None:
                self.store.forget(name)

    def pinned(self, number: int) -> Snapshot | None:
        """Return a document that is in memory."""
        return self._documents.get(number)

    # How it is done.

    def _find(self, model: Any, tokens: np.ndarray) -> tuple[list[Any], int] | None:
        document = self._documents.get(int(tokens[0]))
        there = [s for s in self._there if s.model == model] + ([document] if document else [])
        # Most tokens first; among equals what needs no trimming, and then what is newest.
        reach = {s: usable(s.tokens, tokens, s.trimmable) for s in there}
        order = sorted(there, key=lambda s: (reach[s], -len(s), s.used), reverse=True)
        most = reach[order[0]] if order else 0
        loaded = self._load(model, tokens, most)
        for snapshot in [*loaded, *order]:
            n = len(snapshot) if snapshot in loaded else reach[snapshot]
            caches = trimmed(snapshot.caches, len(snapshot) - n) if n else None
            if caches is not None:
                self._touch(snapshot)
                return caches, n
        return None

    def _load(self, model: Any, tokens: np.ndarray, most: int) -> list[Snapshot]:
        """Take into memory what on disk has read more of a prompt than ``most`` tokens."""
        if self.store is None:
            return []
        number = int(tokens[0])
        name = self._names.get(number, "")
        as_stored = np.concatenate([[0], tokens[1:]]).astype(np.int32) if name else tokens
        found = [(usable(s.tokens, as_stored, 0), s) for s in self.store.all() if s.document == name]
        for n, stored in sorted(found, key=lambda pair: pair[0], reverse=True):
            if n < most + _WORTH_A_FILE:
                break
            caches = self.store.load(stored)
            if caches is not None:
                self._counts["loaded"] += 1
                snapshot = Snapshot(model, tokens[:n], caches, "user", turn=n)
                self._add(snapshot)
                return [snapshot]
        return []

    def _add(self, snapshot: Snapshot):
        hold(snapshot.caches)
        snapshot.measure()
        if self._patch is not None and snapshot.nbytes > self.max_bytes // _SHARE:
            self._cut(snapshot.caches)
            snapshot.measure()
        for other in list(self._there):
            if other.model != snapshot.model:
                continue
            n = common_tokens(other.tokens, snapshot.tokens)
            if n == len(snapshot) and self._replaces(other, snapshot):
                other.turn = max(other.turn, snapshot.turn)
                self._touch(other)
                return
            if n == len(other) and self._replaces(snapshot, other):
                snapshot.turn = max(snapshot.turn, other.turn)
                self._there.remove(other)
        self._there.append(snapshot)
        self._touch(snapshot)
        self.trim_to()

    def _replaces(self, longer: Snapshot, other: Snapshot) -> bool:
        """Return whether what begins with another's tokens can be taken back to it."""
        more = len(longer) - len(other)
        if not more:
            return longer.trimmable >= other.trimmable
        # What many conversations begin with stays, whatever becomes of this one.
        return other.kind != "system" and more <= longer.trimmable

    def _cut(self, caches: list[Any]):
        if self._patch is not None:
            self._patch.prune(caches)

    def _touch(self, snapshot: Snapshot):
        self._clock += 1
        snapshot.used = self._clock

    def _is_of_reading(self, tokens: Sequence[int]) -> bool:
        return any(key_of(tokens[: len(key) // 4]) == key for key in self._reading)

    # On disk: the end of a user's turn, when the answer to it is over and nobody waits for
    # its next token, or earlier if it has to leave memory. An answer's own end is not worth
    # a file: most templates render answers another way than they were written.

    def _store_turn(self, answer: Snapshot):
        if self.store is None:
            return
        asked = [s for s in self._there if s.turn and common_tokens(s.tokens[: s.turn], answer.tokens) == s.turn]
        if asked:
            self._store(max(asked, key=lambda s: s.turn))

    def _store(self, snapshot: Snapshot):
        if self.store is None or snapshot.turn < _WORTH_A_FILE:
            return
        tokens = snapshot.tokens[: snapshot.turn].copy()
        name = self._names.get(int(tokens[0]), "")
        if name:
            tokens[0] = 0
        if tokens[0] < 0 or self.store.has(tokens, name):
            return
        caches = trimmed(snapshot.caches, len(snapshot) - snapshot.turn)
        if caches is not None:
            self.store.save(tokens, name, caches)
