"""A baseline with the model's own attention, after SnapKV [1]: what the prompt's last queries look at.

SnapKV keeps a set of keys for each head. A cache of this project has one set a layer, so here the
heads' attention is averaged; the observed queries are as many as `observation_window`.

[1] Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024.
"""

import mlx.core as mx

from ..eviction import POOL_RADIUS, Eviction
from ..selectors import pool_neighbours, select_evicted


class SnapIndexer:
    """Give a cache the attention's own queries to observe; what it keeps of a key says nothing."""

    has_retention = False

    def bind(self, layer):
        """Bind the layer whose queries are observed."""
        bound = SnapIndexer()
        bound.layer = layer
        return bound

    def project_keys(self, x, offset=0):
        """Return index keys `[B, 1, L, 1]`, all equal."""
        return mx.zeros((x.shape[0], 1, x.shape[1], 1), x.dtype)

    def project_queries(self, x, offset=0):
        """Return the rotated queries `[B, Hq, L, D]` and weights `[B, L, 1]`."""
        return self.layer.project(x, offset).queries, mx.ones((*x.shape[:2], 1), x.dtype)


class SnapEviction(Eviction):
    """Keep what the last queries of the prompt attend to, and all that is newer while there is room.

    Args:
        indexer (SnapIndexer): bound to the layer.
        config (SparseConfig): with evict "index", which has queries observed.
    """

    # More than any mean of attention: what came after the prompt goes after what came in it.
    _NEWER = 2.0

    def project(self, x, offset):
        """Return index keys, and what a new entry is worth, twice, `[B, 1, L, 2]`."""
        worth = mx.full((x.shape[0], 1, x.shape[1], 2), self._NEWER)
        return [self._indexer.project_keys(x, offset), worth]

    @property
    def _plans(self):
        return self._config.n_recent >= 4

    def _worth(self, cache):
        return cache.worth

    def _least(self, x, cache):
        # Where evictions are not planned, too, what entries are worth is decided.
        return select_evicted(cache.worth, cache.positions, cache.offset, *self._forced)

    def _prompt_scores(self, cache):
        queries, _, positions = cache.window
        if cache.shift:  # keys have been numbered anew
            back = mx.full((queries.shape[0], queries.shape[2]), -cache.shift, mx.int32)
            queries = self._indexer.layer.turn(queries, back)
        attention = _attention(queries, cache.keys, cache.positions, positions, self._indexer.layer)
        scores = pool_neighbours(attention, cache.positions, POOL_RADIUS)
        return scores, scores


def _attention(queries, keys, positions, seen_from, layer):
    """Return the mean attention that keys are paid `[B, T]`, over heads and queries that see them."""
    B, n_heads, W, D = queries.shape
    groups = queries.reshape(B, keys.shape[1], -1, W, D).astype(mx.float32)
    logits = (groups * layer.scale) @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
    seen = positions[:, None] <= mx.array(seen_from, mx.int32)[:, None]  # [B, W, T]
    logits = mx.where(seen[:, None, None], logits, -mx.inf)
    total = mx.softmax(logits, axis=-1).sum(axis=(1, 2, 3))
    return total / mx.maximum(seen.sum(axis=1), 1) / n_heads
