"""A KV cache that keeps every entry."""

from __future__ import annotations

from .sparse import SparseKVCache


class FullKVCache(SparseKVCache):
    """Keep keys, values and index keys of every token."""

    _saves_memory = "for less memory use cache 'budget' or 'tiered'"
