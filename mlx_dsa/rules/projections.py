"""Trained search projections: the keys whose search vector is nearest to the query's.

unixsysdev, Make Attention Sub-Quadratic Again: Learned Search Projections for Attention Candidate
Retrieval (ann-sparseattention), 2026. Deviations: sinks and the newest keys are always among the
top_k; of equal scores the newer key wins; a tile of queries may share a selection, by the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from ..search import Projections
from .rule import Probe
from .select_rule import SelectRule

# Numbers of the keys that are float32 at once.
_BLOCK = 1 << 24


@register("select", Projections.kind)
@dataclass(frozen=True)
class SelectProjections(SelectRule):
    """Score keys by the cosine of the layer's search projections, one set a query."""

    wants_indexer = True
    keeps_entry = True
    reads = Projections.kind

    def entry_width(self):
        return self.indexer.args.index_head_dim

    def entry(self, x, offset):
        return self.indexer.project_keys(x)

    def probe(self, x, offset, queries=None):
        return Probe(self.indexer.project_queries(x), mx.ones((*x.shape[:2], 1), x.dtype))

    def scores(self, probe, cache, n_visible, end):
        queries = probe.queries[:, 0].astype(mx.float32)
        keys = cache.index_keys[:, 0, :end]
        # In float32: products in 16 bits would have many equal scores.
        block = max(1, _BLOCK // (keys.shape[0] * keys.shape[2]))
        parts = [queries @ keys[:, i : i + block].astype(mx.float32).swapaxes(-1, -2) for i in range(0, end, block)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
