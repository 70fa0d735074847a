"""The cache that a sparse layer needs."""

from __future__ import annotations

from ..config import SparseConfig
from .budget import BudgetKVCache
from .cold import MemoryStore
from .cold_file import ColdFile, FileStore
from .full import FullKVCache
from .sparse import SparseKVCache
from .tiered import TieredKVCache


def make_cache(config: SparseConfig, layer: int, cold_file: ColdFile | None = None) -> SparseKVCache:
    """Make the empty cache of a sparse layer.

    Args:
        config (SparseConfig): What to keep.
        layer (int): The layer's number.
        cold_file (ColdFile, optional): Where a tiered cache's cold entries go.
          Default: ``None``, to memory.

    Returns:
        SparseKVCache: It, of a class of its own for a budget or two tiers.
    """
    if config.cache == "full":
        return FullKVCache()
    if config.cache == "budget":
        return BudgetKVCache(config.top_k, phase=layer)

    def make_store():
        if cold_file is None:
            return MemoryStore(config.cold_bits or 8)
        return FileStore(cold_file)

    return TieredKVCache(config.top_k, make_store, phase=layer)
