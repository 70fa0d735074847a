"""Sparse attention around one attention layer of a model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .arrays import start_on
from .batch import attend_rows
from .cache import BudgetKVCache, FullKVCache, RowsCache, SparseKVCache
from .chunks import cut_chunk, stream_cuts
from .config import SparseConfig
from .crossovers import PrefillPlan
from .eviction import Eviction
from .families import Layer, Projected
from .indexer import Indexer
from .ops import gather_rows, sparse_attention, tile_attention
from .positions import PositionLimit, check_turn
from .projections import JoinedProjections
from .rules import EvictRule, fold_heads, make_rule
from .search import Projections


class SparseAttention(nn.Module):
    """Attend to the keys that a rule selects.

    While a query sees at most ``top_k`` keys, the result is the wrapped layer's
    own. What the rule keeps of a token is cached from the first one on.

    Args:
        layer (Layer): The attention layer of a model.
        indexer (Indexer or Projections, optional): What its rules read, bound to the model;
          ``None`` where they read nothing.
        config (SparseConfig): What to select and keep.
        plan (PrefillPlan): How a prompt is read.
        evict (EvictRule, optional): In place of the config's. Default: ``None``.

    Attributes:
        selecting (SelectRule): What selects keys.
        eviction (Eviction): What keeps a budget cache to its budget.
        limit (PositionLimit): Warns where a text has more positions than the model.
        by_head (bool): Whether each key head keeps entries of its own.
        joined (callable): Projects with one product, for steps of decode.
        starts (bool): Whether the device starts on a chunk of a prompt at this layer,
          while Python builds the layers after it.
    """

    def __init__(
        self,
        layer: Layer,
        indexer: Indexer | Projections | None,
        config: SparseConfig,
        plan: PrefillPlan,
        evict: EvictRule | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.attention = layer.module
        self.indexer = indexer
        self.config = config
        self.prefill, self.dense_until = plan
        check_turn(layer.module.rope, config.positions)
        self.selecting = make_rule("select", config.select).bind(layer, indexer, config.backend)
        self.eviction = Eviction(self._evict_rule(evict), config, layer.turn)
        self.by_head = self.eviction.rule.by_head and config.cache == "budget"
        self.starts = False
        self.limit = PositionLimit(None)
        self.joined = JoinedProjections(layer.module)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: Any = None,
    ) -> mx.array:
        """Run the layer.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            mask: Not read: mlx-lm builds it for the first layer's cache.
            cache (SparseKVCache or RowsCache, optional): Without it the tokens
              are the whole text, of which only a stream drops something.

        Returns:
            mx.array: ``[B, L, dim]``.

        Raises:
            ValueError: If the cache was not made for this patch.
        """
        self.selecting.begin()
        if isinstance(cache, RowsCache):
            return attend_rows(self, x, cache)
        streams = self.prefill == "stream"
        if cache is None:
            cache = BudgetKVCache(self.config.top_k) if streams else FullKVCache()
        elif not isinstance(cache, SparseKVCache):
            raise ValueError(
                f"[SparseAttention] 'cache' must be made after patching, with "
                f"make_prompt_cache(model), but got a {type(cache).__name__}."
            )
        budget = getattr(cache, "budget", self.config.top_k)
        if budget != self.config.top_k:
            raise ValueError(
                f"[SparseAttention] 'cache' keeps {budget} entries but top_k is "
                f"{self.config.top_k}. Make one with make_prompt_cache(model)."
            )
        if streams and not (cache.evicts or cache.recalls):
            raise ValueError(
                "[SparseAttention] 'cache' keeps all entries but prefill 'stream' cuts it. "
                "Make one with make_prompt_cache(model)."
            )
        if x.shape[1] > 1 and cache.prompt.held == "decode":
            steps = [self.attend(step, cache, 1) for step in mx.split(x, x.shape[1], axis=1)]
            return mx.concatenate(steps, axis=1)
        return self.attend(x, cache, x.shape[1])

    def attend(self, x: mx.array, cache: SparseKVCache, n_tokens: int) -> mx.array:
        """Run the layer as :meth:`__call__` does, for a cache of its own kind.

        Args:
            n_tokens (int): Tokens of the model's call: more than ``L`` where ``x`` was padded.
        """
        streams = self.prefill == "stream"
        in_prompt = cache.prompt.call(n_tokens)
        if streams and cache.asks():
            in_prompt = False  # what is cold is recalled for it, as for a step of decode
        if in_prompt and streams:
            output, gate = self._stream(x, cache)
        else:
            cache.end_stream()
            if not in_prompt and cache.evicts:
                self.make_room(cache)  # which may number entries anew
            self.limit.check(cache, x.shape[1])
            read = self._prefill if in_prompt else self._decode
            # A sparse step is not bit for bit a dense one, so it takes the fastest way.
            is_sparse_step = not in_prompt and cache.size() >= self.config.top_k
            linear = self.joined if is_sparse_step else None
            queries, keys, values, gate = self._project(x, cache, linear)
            output = read(x, queries, keys, values, cache)
        if self.by_head:
            output = output.reshape(x.shape[0], -1, *output.shape[2:])
        if self.starts and x.shape[1] > 1:
            start_on(output)
        return self.layer.output(output, gate)

    def join(self):
        """Project in steps of decode with one product; changes the wrapped layer's arrays
        to views with the same values."""
        self.joined.join()

    def release(self):
        """Let go of what the layer shares with the one that it wraps."""
        self.joined.release()

    def _project(self, x, cache, linear=None) -> Projected:
        projected = self.layer.project(x, cache.number, linear)
        if not self.by_head:
            return projected
        # Key heads are rows of the batch, each with its entries.
        queries, keys, values = (fold_heads(a, self.layer.n_kv_heads) for a in projected[:3])
        return Projected(queries, keys, values, projected.gate)

    def _append(self, x, keys, values, cache: SparseKVCache):
        cache.settle(self.eviction.project)
        cache.sort()
        if cache.evicts or self.prefill == "stream":
            cache.append(keys, values, *self.eviction.project(x, cache.offset))
        else:
            cache.append(keys, values, self.selecting.entry(x, cache.offset))

    def _attend_all(self, queries, keys, values, *, causal: bool) -> mx.array:
        # The very call of mlx-lm's dense layer, so that the result is the same bits.
        return mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=self.layer.scale,
            mask="causal" if causal else None,
        )

    # Decode.

    def _decode(self, x, queries, keys, values, cache) -> mx.array:
        if cache.evicts and cache.size() == cache.budget:
            self.eviction.replace(x, keys, values, cache, queries)
            return self._attend_all(queries, cache.keys, cache.values, causal=False)
        if cache.size() < self.config.top_k:
            self._append(x, keys, values, cache)
            if cache.evicts:
                self.eviction.credit(x, cache, queries)
            return self._attend_all(queries, cache.keys, cache.values, causal=False)
        if self.prefill == "stream":  # a later prompt's cuts need more than an entry
            probe = self.selecting.probe(x, cache.offset, queries)
            self._append(x, keys, values, cache)
        else:
            entry, probe = self.selecting.step(x, cache.offset, queries)
            cache.append(keys, values, entry)
        return self._attend_exact(queries, probe, cache, cache.size())

    def make_room(self, cache: Any):
        """Cut a cache to its budget where a prompt has left more; decide what a step drops."""
        if cache.size() > cache.budget:
            self.eviction.prune(cache, decoding=True)
        cache.observed = None
        if cache.size() == cache.budget:
            self.eviction.make_room(cache)

    def take(self, x: mx.array, keys: mx.array, values: mx.array, cache: Any):
        """Add tokens that were attended to elsewhere, as reading them here would.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            keys (mx.array): ``[B, Hkv, L, D]``, rotated.
            values (mx.array): ``[B, Hkv, L, D]``.
            cache (SparseKVCache): Changed in place.
        """
        cache.prompt.reopen()
        if self.by_head:
            keys, values = (fold_heads(a, self.layer.n_kv_heads) for a in (keys, values))
        self._append(x, keys, values, cache)
        if cache.evicts:
            self.eviction.observe(x, cache)

    def _stream(self, x, cache) -> tuple[mx.array, mx.array | None]:
        """Attend in parts to what was kept and to the part's own tokens, and cut the cache
        after each but the last, which waits for its cut; return the gate, too."""
        L = x.shape[1]
        hot = cache.begin_stream() if cache.recalls else cache
        cuts = stream_cuts(self.config.stream_chunk, hot.budget, (L, hot.offset, hot.size()))
        outputs, gates = [], []
        for start, stop in zip([0, *cuts], [*cuts, L]):
            if start == L:  # a cut stands at the end
                break
            part = x[:, start:stop] if cuts else x
            self.limit.check(cache, stop - start)
            queries, keys, values, gate = self._project(part, cache)
            self._append(part, keys, values, cache)
            self.eviction.observe(part, hot, queries)
            outputs.append(self._attend_all(queries, hot.keys, hot.values, causal=stop - start > 1))
            gates.append(gate)
            if stop in cuts:
                if cache.recalls:
                    cache.store()
                self.eviction.cut(hot)
        if len(outputs) > 1:
            gate = None if gate is None else mx.concatenate(gates, axis=1)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2), gate

    def _prefill(self, x, queries, keys, values, cache) -> mx.array:
        L, offset = x.shape[1], cache.offset
        self._append(x, keys, values, cache)
        cuts = cut_chunk(
            self.prefill,
            self.dense_until,
            self.config.tile_size,
            (x.shape[0], L, offset, cache.size()),
        )
        n_dense = cuts[0]
        if cache.evicts:
            self.eviction.observe(x, cache, queries)
        # What selects is made of the queries of the sparse part alone.
        probe = None
        if n_dense < L:
            rest = slice(n_dense, L)
            probe = self.selecting.probe(x[:, rest], offset + n_dense, queries[:, :, rest])

        T = cache.size()
        if cache.recalls:
            # One selection can be recalled, if that gives what reading everything does.
            if n_dense or L > 1 or not cache.recalls_exactly:
                cache = cache.assembled()
        outputs = []
        if n_dense:
            seen = slice(0, T - L + n_dense)
            entries = cache.keys[:, :, seen], cache.values[:, :, seen]
            rows = queries[:, :, :n_dense]
            outputs.append(self._attend_all(rows, *entries, causal=n_dense > 1))
        for start, stop in zip(cuts, cuts[1:]):
            # A tile of one query is that query's own selection: a call of one token does
            # not show whether it ends the prompt.
            shares = self.prefill == "tile" and stop - start > 1
            attend = self._attend_tiles if shares else self._attend_exact
            part = probe.rows(start - n_dense, stop - n_dense)
            outputs.append(attend(queries[:, :, start:stop], part, cache, T - L + stop))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    def _attend_exact(self, queries, probe, cache, end) -> mx.array:
        """Attend with one selection a query; the last query sees ``end`` slots."""
        L = queries.shape[2]
        n_visible = mx.arange(end - L + 1, end + 1)
        top_k = self.config.top_k
        slots = self.selecting.select(probe, cache, top_k, n_visible, end, self._forced)
        return self.attend_selected(queries, cache, slots)

    def _attend_tiles(self, queries, probe, cache, end) -> mx.array:
        """Attend with one selection a tile; the last query sees ``end`` slots."""
        size = min(self.config.tile_size, queries.shape[2])
        # A tile's own keys count inside top_k, whole tile or not.
        top_k = self.config.top_k - self.config.tile_size
        slots = self.selecting.select_tiles(probe, cache, top_k, size, end, self._forced)
        entries = cache.keys[:, :, :end], cache.values[:, :, :end]
        scale, backend, fills = self.layer.scale, self.config.backend, self.selecting.fills
        return tile_attention(queries, *entries, slots, scale, backend, fills)

    def attend_selected(self, queries, cache, slots) -> mx.array:
        """Attend from each query to its own slots: the evaluators look in here.

        Args:
            queries (mx.array): ``[B, Hq, L, D]``.
            cache (SparseKVCache): The entries.
            slots (mx.array): ``[B, L, top_k]``, int32, none empty where the rule fills
              them; or a set a key head, ``[B, Hkv, L, top_k]``.

        Returns:
            mx.array: ``[B, Hq, L, D]``.
        """
        if cache.recalls:
            return self._attend_all(queries, *cache.recall(slots[:, 0]), causal=False)
        if queries.shape[2] == 1 and slots.ndim == 3 and self.selecting.fills:
            rows = (gather_rows(x, slots[:, 0]) for x in (cache.keys, cache.values))
            return self._attend_all(queries, *rows, causal=False)
        return sparse_attention(
            queries,
            cache.keys,
            cache.values,
            slots,
            scale=self.layer.scale,
            backend=self.config.backend,
        )

    @property
    def _forced(self) -> tuple[int, int]:
        return self.config.n_sink, self.config.n_recent

    def _evict_rule(self, given: EvictRule | None) -> EvictRule:
        """Return what orders entries, bound; KeyDiff where it wants a head that is not there."""
        has_head = self.indexer is not None and getattr(self.indexer, "has_retention", False)
        rule = make_rule("evict", self.config.evict) if given is None else given
        if rule.wants_head and not has_head:
            rule = rule.without_head()
        own = self.layer, self.indexer, self.config.backend
        return rule.bind(*own, self.selecting, self.config.observation_window)
