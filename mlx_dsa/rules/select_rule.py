"""What a rule of selecting may say: which keys a query reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..cache import SparseKVCache
from ..checkpoint_file import LIGHTNING
from ..families import Layer
from ..selection import select_topk
from .rule import Probe, Rule


def kind_of(indexer: Any) -> str:
    """Return which rule of selecting reads an indexer."""
    return getattr(indexer, "kind", LIGHTNING)


@dataclass(frozen=True)
class SelectRule(Rule):
    """Which keys a query reads. Give :meth:`scores`, or :meth:`select` itself.

    Attributes:
        keeps_entry (bool): Whether it keeps something of each token beside key and value:
          what :meth:`entry` returns. Without that it reads ``cache.keys``.
        fills (bool): Whether :meth:`select` and :meth:`select_tiles` leave no slot empty.
        by_position (bool): Whether scores depend on positions alone.
        together (bool): Whether what a query reads depends on the others that are read with it.
        reads (str): The kind of trained indexers that it wants, where it does.
    """

    keeps_entry: ClassVar[bool] = False
    fills: ClassVar[bool] = True
    by_position: ClassVar[bool] = False
    together: ClassVar[bool] = False
    reads: ClassVar[str] = LIGHTNING

    def bind(self, layer: Layer, indexer: Any = None, backend: str = "auto"):
        """Return the rule for a layer: see :meth:`Rule.bind`.

        Raises:
            ValueError: If the indexer is of another kind than it reads.
        """
        kind = kind_of(indexer)
        if self.wants_indexer and indexer is not None and kind != self.reads:
            raise ValueError(
                f"[patch_sparse_generate] the indexers given are for select='{kind}', but "
                f"'select' is {self.reads!r}. Set it to that, or give others."
            )
        return super().bind(layer, indexer, backend)

    def follow(self, before: SelectRule | None):
        """Take note of the rule of the sparse layer before, ``None`` for the first; a patch tells each."""

    def begin(self):
        """Take note that a call of the model reaches the layer."""

    def entry_width(self) -> int:
        """Return how many numbers of the layer's dtype :meth:`entry` keeps a token."""
        return 0

    def entry(self, x: mx.array, offset: int) -> mx.array | None:
        """Compute what is kept of tokens: ``cache.index_keys``.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.

        Returns:
            mx.array: ``[B, 1, L, n]``, or ``None``.
        """
        return None

    def probe(self, x: mx.array, offset: int, queries: mx.array | None = None) -> Probe:
        """Compute what scoring needs of queries; by default the layer's own.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.
            queries (mx.array, optional): The layer's ``[B, Hq, L, D]``, where at hand.
        """
        return self.attention_queries(x, offset, queries)

    def step(self, x: mx.array, offset: int, queries: mx.array | None = None) -> tuple[mx.array | None, Probe]:
        """Compute :meth:`entry` and :meth:`probe` at once, for a step of decode."""
        return self.entry(x, offset), self.probe(x, offset, queries)

    def scores(self, probe: Probe, cache: SparseKVCache, n_visible: mx.array, end: int) -> mx.array:
        """Score entries for queries.

        Args:
            probe (Probe): Of ``L`` queries.
            cache (SparseKVCache): The entries, in the order of the text.
            n_visible (mx.array): Entries that each query sees, its first ones ``[L]``.
            end (int): The most that one of them sees.

        Returns:
            mx.array: ``[B, L, end]`` in float32. What a query does not see may have any
            score.
        """
        raise NotImplementedError

    def tile_scores(self, probe: Probe, cache: SparseKVCache, tile_size: int, end: int, first: int) -> mx.array:
        """Score entries before tiles of queries; by default the largest of a tile's.

        Args:
            probe (Probe): Of ``L`` queries, the last of which sees ``end`` entries.
            cache (SparseKVCache): The entries.
            tile_size (int): Neighbouring queries that share a selection; divides ``L``.
            end (int): Entries that the last query sees.
            first (int): Entries before the first tile, without its newest ones: what may
              serve to level queries.

        Returns:
            mx.array: ``[B, L / tile_size, end - tile_size]`` in float32.
        """
        L = probe.queries.shape[2]
        scores = self.scores(probe, cache, mx.arange(end - L + 1, end + 1), end)
        B, T = scores.shape[0], end - tile_size
        return scores[..., :T].reshape(B, L // tile_size, tile_size, T).max(axis=2)

    def select(
        self,
        probe: Probe,
        cache: SparseKVCache,
        top_k: int,
        n_visible: mx.array,
        end: int,
        forced: tuple[int, int],
    ) -> mx.array:
        """Select entries for queries; by default the best-scored.

        Args:
            probe (Probe): Of ``L`` queries.
            cache (SparseKVCache): The entries.
            top_k (int): Entries a query.
            n_visible (mx.array): Entries that each query sees ``[L]``.
            end (int): The most that one of them sees.
            forced (tuple of int): First entries and newest ones, always selected.

        Returns:
            mx.array: Slots ``[B, L, top_k]``, or ``[B, Hkv, L, top_k]`` for a set a key
            head, int32, ascending, empty ones (-1) first; none empty where a query sees as
            many and the rule :attr:`fills`.
        """
        scores = self.scores(probe, cache, n_visible, end)
        return select_topk(scores, top_k, n_visible, *forced, self.backend)

    def select_tiles(
        self,
        probe: Probe,
        cache: SparseKVCache,
        top_k: int,
        tile_size: int,
        end: int,
        forced: tuple[int, int],
    ) -> mx.array:
        """Select entries before tiles of queries, which each read their tile's own, too; by
        default the best by :meth:`tile_scores`.

        Args:
            probe (Probe): Of ``L`` queries, the last of which sees ``end`` entries.
            cache (SparseKVCache): The entries.
            top_k (int): Entries a tile, its own not counted.
            tile_size (int): Neighbouring queries that share a selection; divides ``L``.
            end (int): Entries that the last query sees.
            forced (tuple of int): First entries and newest ones before a tile, always selected.

        Returns:
            mx.array: Slots ``[B, L / tile_size, top_k]``, as of :meth:`select`.
        """
        first = end - probe.queries.shape[2]
        scores = self.tile_scores(probe, cache, tile_size, end, first - forced[1])
        n_visible = mx.array(list(range(first, end, tile_size)))
        return select_topk(scores, top_k, n_visible, *forced, self.backend)
