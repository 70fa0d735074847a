"""Sparse attention around one Qwen3 attention layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .cache import (
    BudgetKVCache,
    FileStore,
    FullKVCache,
    MemoryStore,
    TieredKVCache,
)
from .chunks import cut_chunk
from .config import SparseConfig
from .crossovers import PrefillPlan
from .eviction import Eviction
from .indexer import Indexer
from .ops import (
    gather_rows,
    index_scores,
    sparse_attention,
    tile_attention,
    tile_scores,
)
from .projections import JoinedProjections
from .selectors import select_topk

# Bytes of a cold file between two layers; what is not written takes no space.
_COLD_REGION = 1 << 36
_COLD_HEADER = 4096  # left alone: the file's mark


class SparseAttention(nn.Module):
    """Attend to the keys that an indexer selects.

    While a query sees at most ``top_k`` keys, the result is the wrapped layer's
    own. Index keys are cached from the first token on.

    Args:
        attention (nn.Module): The attention of an mlx-lm Qwen3 layer.
        indexer (Indexer): Its indexer, bound to the model.
        config (SparseConfig): What to select and keep.
        plan (PrefillPlan): How a prompt is read.

    Attributes:
        eviction (Eviction): What keeps a budget cache to its budget.
        starts (bool): Whether the device starts on a chunk of a prompt at this layer,
          while Python builds the layers after it.
    """

    def __init__(
        self, attention: nn.Module, indexer: Indexer, config: SparseConfig, plan: PrefillPlan
    ):
        super().__init__()
        self.attention = attention
        self.indexer = indexer
        self.config = config
        self.prefill, self.dense_until = plan
        self.eviction = Eviction(indexer, config)
        self.starts = False
        self._joined = JoinedProjections(attention)

    def make_cache(self, layer: int) -> FullKVCache:
        """Make the empty cache that this layer needs.

        Args:
            layer (int): The layer's number: its region of a cold file.
        """
        config = self.config
        if config.cache == "full":
            return FullKVCache()
        if config.cache == "budget":
            return BudgetKVCache(config.top_k, phase=layer)

        def make_store():
            if config.cold_file is None:
                return MemoryStore(config.cold_bits or 8)
            return FileStore(config.cold_file, _COLD_HEADER + layer * _COLD_REGION)

        return TieredKVCache(config.top_k, make_store)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: FullKVCache | None = None,
    ) -> mx.array:
        """Run the layer.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            mask: Not read: mlx-lm builds it for the first layer's cache.
            cache (FullKVCache or BudgetKVCache, optional): Without it the tokens
              are the whole text.

        Returns:
            mx.array: ``[B, L, dim]``.

        Raises:
            ValueError: If the cache was not made for this patch.
        """
        if cache is None:
            cache = FullKVCache()
        elif not isinstance(cache, FullKVCache):
            raise ValueError(
                f"[SparseAttention] 'cache' must be made after patching, with "
                f"make_prompt_cache(model), but got a {type(cache).__name__}."
            )
        if isinstance(cache, BudgetKVCache) and cache.budget != self.config.top_k:
            raise ValueError(
                f"[SparseAttention] 'cache' keeps {cache.budget} entries but top_k is "
                f"{self.config.top_k}. Make one with make_prompt_cache(model)."
            )
        read = self._decode if x.shape[1] == 1 else self._prefill
        output = read(x, *self._project(x, cache), cache)
        B, L = x.shape[:2]
        if self.starts and L > 1:
            _start(output)
        output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.attention.o_proj(output)

    def release(self):
        """Let go of what the layer shares with the one that it wraps."""
        self._joined.release()

    def _project(self, x: mx.array, cache: FullKVCache):
        """Compute queries, keys and values, as the wrapped layer does."""
        B, L, _ = x.shape
        attention, offset = self.attention, cache.offset
        # A sparse step is not bit for bit a dense one, so it takes the fastest way.
        is_sparse_step = L == 1 and cache.size() >= self.config.top_k
        project = self._joined if is_sparse_step else self._joined.apart
        queries, keys, values = project(x)
        queries = queries.reshape(B, L, attention.n_heads, -1)
        keys = keys.reshape(B, L, attention.n_kv_heads, -1)
        values = values.reshape(B, L, attention.n_kv_heads, -1)
        queries = attention.q_norm(queries).transpose(0, 2, 1, 3)
        keys = attention.k_norm(keys).transpose(0, 2, 1, 3)
        queries = attention.rope(queries, offset=offset)
        keys = attention.rope(keys, offset=offset)
        return queries, keys, values.transpose(0, 2, 1, 3)

    def _append(self, x, keys, values, cache: FullKVCache):
        if isinstance(cache, BudgetKVCache):
            cache.settle(self.eviction.project)
            cache.sort()
            cache.append(keys, values, *self.eviction.project(x, cache.offset))
        else:
            cache.append(keys, values, self.indexer.project_keys(x, cache.offset))

    def _attend_all(self, queries, keys, values, causal: bool) -> mx.array:
        # The very call of mlx-lm's dense layer, so that the result is the same bits.
        return mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=self.attention.scale,
            mask="causal" if causal else None,
        )

    # Decode.

    def _decode(self, x, queries, keys, values, cache) -> mx.array:
        top_k = self.config.top_k
        has_budget = isinstance(cache, BudgetKVCache)
        if has_budget and cache.size() <= cache.budget:
            cache.window = None  # the prompt ends here without a prune
        if has_budget and cache.size() == cache.budget:
            self.eviction.replace(x, keys, values, cache)
            return self._attend_all(queries, cache.keys, cache.values, causal=False)
        if cache.size() < top_k:
            self._append(x, keys, values, cache)
            return self._attend_all(queries, cache.keys, cache.values, causal=False)
        if has_budget:
            index_queries, weights = self.indexer.project_queries(x, cache.offset)
            self._append(x, keys, values, cache)
        else:
            index_keys, index_queries, weights = self.indexer.project(x, cache.offset)
            cache.append(keys, values, index_keys)
        T = cache.size()
        scores = self.score(index_queries, weights, cache.index_keys)
        slots = select_topk(scores, top_k, mx.array([T]), *self._forced)
        output = self.attend_selected(queries, cache, slots)
        if has_budget:
            if self.eviction.rule == "index":
                cache.observe(index_queries, weights, self.config.observation_window)
            self.eviction.prune(cache, decoding=True)
        return output

    def take(self, x: mx.array, keys: mx.array, values: mx.array, cache: FullKVCache):
        """Add tokens that were attended to elsewhere, as reading them here would.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            keys (mx.array): ``[B, Hkv, L, D]``, rotated.
            values (mx.array): ``[B, Hkv, L, D]``.
            cache (FullKVCache): Changed in place.
        """
        self._append(x, keys, values, cache)
        if isinstance(cache, BudgetKVCache) and self.eviction.rule == "index":
            n = min(x.shape[1], self.config.observation_window)
            window = self.indexer.project_queries(x[:, -n:], cache.offset - n)
            cache.observe(*window, self.config.observation_window)

    def _prefill(self, x, queries, keys, values, cache) -> mx.array:
        L = x.shape[1]
        offset = cache.offset
        is_budget = isinstance(cache, BudgetKVCache)
        self._append(x, keys, values, cache)
        cuts = cut_chunk(
            self.prefill,
            self.dense_until,
            self.config.tile_size,
            (x.shape[0], L, offset, cache.size()),
        )
        n_dense = cuts[0]
        n_window = 0
        if is_budget and self.eviction.rule == "index":
            n_window = min(L, self.config.observation_window)
        # Index queries are made for the sparse part and for the window alone.
        first = min(n_dense, L - n_window)
        index_queries = weights = None
        if first < L:
            index_queries, weights = self.indexer.project_queries(
                x[:, first:], offset + first
            )
        if n_window:
            window = (index_queries[:, :, -n_window:], weights[:, -n_window:])
            cache.observe(*window, self.config.observation_window)

        T = cache.size()
        if isinstance(cache, TieredKVCache):
            cache = cache.assembled()
        outputs = []
        if n_dense:
            seen = slice(0, T - L + n_dense)
            entries = cache.keys[:, :, seen], cache.values[:, :, seen]
            rows = queries[:, :, :n_dense]
            outputs.append(self._attend_all(rows, *entries, causal=n_dense > 1))
        attend = self._attend_tiles if self.prefill == "tile" else self._attend_exact
        for start, stop in zip(cuts, cuts[1:]):
            part = slice(start - first, stop - first)
            outputs.append(
                attend(
                    queries[:, :, start:stop],
                    index_queries[:, :, part],
                    weights[:, part],
                    cache,
                    T - L + stop,
                )
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    def _attend_exact(self, queries, index_queries, weights, cache, end) -> mx.array:
        """Attend with one selection a query; the last query sees ``end`` slots."""
        L = queries.shape[2]
        scores = self.score(index_queries, weights, cache.index_keys[:, :, :end])
        n_visible = mx.arange(end - L + 1, end + 1)
        slots = self._select(scores, self.config.top_k, n_visible)
        return self.attend_selected(queries, cache, slots)

    def _attend_tiles(self, queries, index_queries, weights, cache, end) -> mx.array:
        """Attend with one selection a tile; the last query sees ``end`` slots."""
        L = queries.shape[2]
        size = min(self.config.tile_size, L)
        n_visible = mx.array(list(range(end - L, end, size)))
        scores = tile_scores(
            index_queries,
            weights,
            cache.index_keys[:, :, : end - size],
            size,
            end - L - self.config.n_recent,
            self.config.backend,
        )
        # A tile's own keys count inside top_k, whole tile or not.
        top_k = self.config.top_k - self.config.tile_size
        slots = self._select(scores, top_k, n_visible)
        return tile_attention(
            queries,
            cache.keys[:, :, :end],
            cache.values[:, :, :end],
            slots,
            self.attention.scale,
            self.config.backend,
        )

    def _select(self, scores, top_k, n_visible) -> mx.array:
        backend = self.config.backend
        return select_topk(scores, top_k, n_visible, *self._forced, backend)

    def attend_selected(self, queries, cache, slots) -> mx.array:
        """Attend from each query to its own slots: the evaluators look in here.

        Args:
            queries (mx.array): ``[B, Hq, L, D]``.
            cache (FullKVCache): The entries.
            slots (mx.array): ``[B, L, top_k]``, int32, none empty.

        Returns:
            mx.array: ``[B, Hq, L, D]``.
        """
        if isinstance(cache, TieredKVCache):
            return self._attend_all(queries, *cache.recall(slots[:, 0]), causal=False)
        if queries.shape[2] == 1:
            rows = (gather_rows(x, slots[:, 0]) for x in (cache.keys, cache.values))
            return self._attend_all(queries, *rows, causal=False)
        return sparse_attention(
            queries,
            cache.keys,
            cache.values,
            slots,
            scale=self.attention.scale,
            backend=self.config.backend,
        )

    def score(self, index_queries, weights, index_keys) -> mx.array:
        """Score keys for queries.

        Args:
            index_queries (mx.array): ``[B, Hi, L, Di]``.
            weights (mx.array): Head weights ``[B, L, Hi]``.
            index_keys (mx.array): ``[B, 1, T, Di]``.

        Returns:
            mx.array: ``[B, L, T]``, float32.
        """
        return index_scores(index_queries, weights, index_keys, self.config.backend)

    @property
    def _forced(self) -> tuple[int, int]:
        return self.config.n_sink, self.config.n_recent


def _start(array: mx.array):
    try:
        mx.async_eval(array)
    except ValueError:  # MLX traces a function: there is nothing to start
        pass
