"""What a rule of forgetting may say: which entries are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..cache import BudgetKVCache
from ..families import Layer
from ..registry import make_rule
from .rule import Probe, Rule, fold_heads
from .select_rule import SelectRule


@dataclass(frozen=True)
class EvictRule(Rule):
    """Which entries a budget forgets first. Give :meth:`worth`.

    Attributes:
        selecting (SelectRule): Once bound, the layer's rule of selecting.
        observes (int): Once bound, the last queries of a prompt that :meth:`worth` finds in
          ``cache.observed``.
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
        indexer: Any = None,
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
              ``cache.observed`` has the observed queries.

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
