"""KV caches that carry index keys."""

from .budget import BudgetKVCache
from .cold import MemoryStore
from .cold_file import ColdFile, FileStore
from .full import FullKVCache
from .making import make_cache
from .rows import RowsCache
from .sparse import SparseKVCache
from .tiered import TieredKVCache

__all__ = [
    "BudgetKVCache",
    "ColdFile",
    "FileStore",
    "FullKVCache",
    "MemoryStore",
    "RowsCache",
    "SparseKVCache",
    "TieredKVCache",
    "make_cache",
]
