"""What a rule may say: which keys a query reads, and which entries are worth keeping.

A rule is a frozen dataclass whose fields are its options. Bound to a layer it is the same
rule, which knows that layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..cache import BudgetKVCache, FullKVCache
from ..checkpoint_file import LIGHTNING
from ..families import Layer
from ..indexer import Indexer
from ..registry import make_rule
from ..selectors import select_topk


class Probe(NamedTuple):
    """What scoring needs of some queries.

    Args:
        queries (mx.array): ``[B, H, L, n]``.
        weights (mx.array): ``[B, L, H]``.
    """

    queries: mx.array
    weights: mx.array

    def rows(self, start: int, stop: int) -> Probe:
        """Return that of some of the queries."""
        return Probe(self.queries[:, :, start:stop], self.weights[:, start:stop])


def fold_heads(x: mx.array, n_kv_heads: int) -> mx.array:
    """Make key heads rows of the batch: ``[B, H, L, D]`` to ``[B * Hkv, H / Hkv, L, D]``."""
    B, n_heads, *rest = x.shape
    return x.reshape(B * n_kv_heads, n_heads // n_kv_heads, *rest)


def at_least(kind: str, name: str, **options: tuple[int, int]):
    """Refuse options of a rule that are too small.

    Args:
        kind (str): ``"select"`` or ``"evict"``.
        name (str): The rule.
        **options: Their values and the least that each may be.
    """
    for option, (value, least) in options.items():
        if value < least:
            raise ValueError(
                f"[SparseConfig] {kind!r} {name!r}: option {option!r} must be at least {least} "
                f"but got {value}."
            )


@dataclass(frozen=True)
class Rule:
    """A rule of either kind.

    Attributes:
        wants_indexer (bool): Whether it reads the layer's indexer.
        layer (Layer): Once bound, the attention layer; ``indexer``, bound too, or ``None``.
        backend (str): Once bound, the kernels to use.
    """

    wants_indexer: ClassVar[bool] = False
    layer: ClassVar[Layer]
    indexer: ClassVar[Indexer | None]
    backend: ClassVar[str]

    def check(self, config: Any):
        """Refuse settings that the rule can't run with.

        Args:
            config (SparseConfig): All of them.

        Raises:
            ValueError: Which says what to change.
        """

    def bind(self, layer: Layer, indexer: Indexer | None = None, backend: str = "auto"):
        """Return the rule for a layer.

        Args:
            layer (Layer): An attention layer of a model.
            indexer (Indexer, optional): The layer's, bound to it. Default: ``None``.
            backend (str): Kernels to use. Default: ``"auto"``.
        """
        return self._with(layer=layer, indexer=indexer, backend=backend)

    def _with(self, **attributes: Any):
        bound = copy.copy(self)
        for name, value in attributes.items():
            object.__setattr__(bound, name, value)
        return bound

    def attention_queries(self, x: mx.array, offset: int, queries: mx.array | None = None):
        """Return the layer's own queries as a probe.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.
            queries (mx.array, optional): What the layer made of them ``[B, Hq, L, D]``,
              rotated, where that is at hand.
        """
        if queries is None:
            queries = self.layer.project(x, offset).queries
        return Probe(queries, mx.ones((queries.shape[0], x.shape[1], 1), x.dtype))


@dataclass(frozen=True)
class SelectRule(Rule):
    """Which keys a query reads. Give :meth:`scores`, or :meth:`select` itself.

    Attributes:
        keeps_entry (bool): Whether it keeps something of each token beside key and value:
          what :meth:`entry` returns. Without that it reads ``cache.keys``.
        fills (bool): Whether :meth:`select` leaves no slot empty.
        reads (str): The kind of trained indexers that it wants, where it does.
    """

    keeps_entry: ClassVar[bool] = False
    fills: ClassVar[bool] = True
    reads: ClassVar[str] = LIGHTNING

    def bind(self, layer: Layer, indexer: Indexer | None = None, backend: str = "auto"):
        """Return the rule for a layer: see :meth:`Rule.bind`.

        Raises:
            ValueError: If the indexer is of another kind than it reads.
        """
        kind = getattr(indexer, "kind", LIGHTNING)
        if self.wants_indexer and indexer is not None and kind != self.reads:
            raise ValueError(
                f"[patch_sparse_generate] the indexers given are for select='{kind}', but "
                f"'select' is {self.reads!r}. Set it to that, or give others."
            )
        return super().bind(layer, indexer, backend)

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

    def step(
        self, x: mx.array, offset: int, queries: mx.array | None = None
    ) -> tuple[mx.array | None, Probe]:
        """Compute :meth:`entry` and :meth:`probe` at once, for a step of decode."""
        return self.entry(x, offset), self.probe(x, offset, queries)

    def scores(
        self, probe: Probe, cache: FullKVCache, n_visible: mx.array, end: int
    ) -> mx.array:
        """Score entries for queries.

        Args:
            probe (Probe): Of ``L`` queries.
            cache (FullKVCache): The entries, in the order of the text.
            n_visible (mx.array): Entries that each query sees, its first ones ``[L]``.
            end (int): The most that one of them sees.

        Returns:
            mx.array: ``[B, L, end]`` in float32. What a query does not see may have any
            score.
        """
        raise NotImplementedError

    def tile_scores(
        self, probe: Probe, cache: FullKVCache, tile_size: int, end: int, first: int
    ) -> mx.array:
        """Score entries before tiles of queries; by default the largest of a tile's.

        Args:
            probe (Probe): Of ``L`` queries, the last of which sees ``end`` entries.
            cache (FullKVCache): The entries.
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
        cache: FullKVCache,
        top_k: int,
        n_visible: mx.array,
        end: int,
        forced: tuple[int, int],
    ) -> mx.array:
        """Select entries for queries; by default the best-scored.

        Args:
            probe (Probe): Of ``L`` queries.
            cache (FullKVCache): The entries.
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


@dataclass(frozen=True)
class EvictRule(Rule):
    """Which entries a budget forgets first. Give :meth:`worth`.

    Attributes:
        selecting (SelectRule): Once bound, the layer's rule of selecting.
        observes (int): Once bound, the last queries of a prompt that :meth:`worth` finds in
          ``cache.window``.
        is_final (bool): Whether what the end of a prompt says stands for later steps, and
          tokens that come then are worth :meth:`score`. Else :meth:`worth` is asked again.
        every_step (bool): Whether each step's query decides what goes, by
          :meth:`step_worth`. Else evictions are planned for many steps at once.
        wants_head (bool): Whether it reads the indexer's retention head.
        by_head (bool): Whether each key head keeps entries of its own. A rule may have it
          as an option: bound, it then sees a cache in which the key heads are rows of the
          batch, ``[B * Hkv, 1, T, D]``, and so are its observed queries.
        credits (bool): Whether each query that is read changes what entries are worth, by
            :meth:`credit`; goes with :attr:`every_step` and a :meth:`score`.
        merges (bool): Whether what is dropped goes into what stays, by :meth:`merged`.
    """

    observes: ClassVar[int] = 0
    is_final: ClassVar[bool] = False
    every_step: ClassVar[bool] = False
    wants_head: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    credits: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    selecting: ClassVar[SelectRule]

    def bind(
        self,
        layer: Layer,
        indexer: Indexer | None = None,
        backend: str = "auto",
        selecting: SelectRule | None = None,
        observes: int = 0,
    ):
        """Return the rule for a layer: see :meth:`Rule.bind`.

        Args:
            selecting (SelectRule, optional): The layer's rule of selecting.
            observes (int): ``observation_window`` of the settings, which counts where the
              rule observes queries. Default: ``0``.
        """
        bound = super().bind(layer, indexer, backend)
        return bound._with(selecting=selecting, observes=observes if self.observes else 0)

    @property
    def keeps_score(self) -> bool:
        """Whether :meth:`score` gives something, which a budget keeps."""
        return type(self).score is not EvictRule.score

    def score(self, x: mx.array, offset: int) -> mx.array | None:
        """Say what tokens are worth when they are read, to be kept as ``cache.retention``.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.

        Returns:
            mx.array: ``[B, L]`` in float32, or ``None``: nothing is kept.
        """
        return None

    def project(self, x: mx.array, offset: int) -> list[mx.array | None]:
        """Compute what a budget keeps beside keys and values.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.

        Returns:
            list: The entry of the rule of selecting ``[B, 1, L, n]``, or ``None``, and where
            there is a score, it twice, ``[B, 1, L, 2]`` in float32.
        """
        entries = self._entries(self.selecting.entry(x, offset), self.score(x, offset))
        if not self.by_head:
            return entries
        n = self.layer.n_kv_heads
        return [e if e is None else mx.repeat(e, n, axis=0) for e in entries]

    def _entries(self, entry, score) -> list[mx.array | None]:
        if score is None:
            return [entry]
        B, L = score.shape
        return [entry, mx.broadcast_to(score[:, None, :, None], (B, 1, L, 2))]

    def observed(self, x: mx.array, offset: int) -> Probe:
        """Return what is remembered of queries; by default what selects."""
        return self.selecting.probe(x, offset)

    def attention_queries(self, x, offset, queries=None):
        """Return the layer's own queries, a key head's a row where each has its entries."""
        probe = super().attention_queries(x, offset, queries)
        if not self.by_head:
            return probe
        folded = fold_heads(probe.queries, self.layer.n_kv_heads)
        return Probe(folded, mx.ones((folded.shape[0], x.shape[1], 1), x.dtype))

    def worth(self, cache: BudgetKVCache) -> mx.array | None:
        """Say what the entries of a cache are worth now.

        Args:
            cache (BudgetKVCache): In the order of positions; at the end of a prompt
              ``cache.window`` has the observed queries.

        Returns:
            mx.array: ``[B, size]`` in float32; ``None``: the oldest go.
        """
        raise NotImplementedError

    def step_worth(self, x: mx.array, cache: BudgetKVCache) -> mx.array:
        """Say what entries are worth to one query, where :attr:`every_step`.

        Args:
            x (mx.array): Its normalised hidden state ``[B, 1, dim]``.
            cache (BudgetKVCache): The entries, in any order.

        Returns:
            mx.array: ``[B, size]`` in float32.
        """
        raise NotImplementedError

    def credit(self, cache: BudgetKVCache, queries: mx.array) -> mx.array:
        """Say what entries gain by new queries, where :attr:`credits`.

        Args:
            cache (BudgetKVCache): The entries, in any order, those of the queries' own
                tokens, the newest, among them.
            queries (mx.array): The layer's ``[B, Hq, L, D]``, rotated.

        Returns:
            mx.array: ``[B, size]`` in float32, to be added to ``cache.worth``.
        """
        raise NotImplementedError

    def merged(self, cache: BudgetKVCache, slots: mx.array, worth: mx.array | None) -> mx.array:
        """Put what a prune drops into the values of what it keeps, where :attr:`merges`.

        Args:
            cache (BudgetKVCache): In the order of positions, before the prune.
            slots (mx.array): Slots that stay ``[B, n]``, ascending.
            worth (mx.array, optional): What :meth:`worth` says ``[B, size]``.

        Returns:
            mx.array: Values of what stays ``[B, Hkv, n, D]``.
        """
        raise NotImplementedError

    def shares(self, worth: mx.array) -> mx.array | None:
        """Say how much entries count where they are merged, from what they are worth.

        Args:
            worth (mx.array): ``[B, size]`` in float32.

        Returns:
            mx.array: Attention, ``[B, size]`` in float32; ``None``: all alike.
        """
        return None

    def without_head(self) -> EvictRule:
        """Return the rule in place of this one, where :attr:`wants_head` and there is none."""
        return make_rule("evict", "keydiff")
