"""KV caches that carry index keys."""

from .budget import BudgetKVCache
from .cold import MemoryStore
from .cold_file import ColdFile, FileStore
from .full import FullKVCache
from .making import make_cache
from .sparse import SparseKVCache
from .tiered import TieredKVCache

__all__ = [
    "BudgetKVCache",
    "ColdFile",
    "FileStore",
    "FullKVCache",
    "MemoryStore",
    "SparseKVCache",
    "TieredKVCache",
    "make_cache",
]
