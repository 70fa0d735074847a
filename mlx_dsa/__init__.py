"""DeepSeek Sparse Attention for Qwen and Llama models in MLX."""

from . import startup

startup.prepare()  # before anything imports mlx.core

from .cache import BudgetKVCache, FullKVCache  # noqa: E402
from .checkpoint import load_indexers, save_indexers  # noqa: E402
from .config import SparseConfig  # noqa: E402
from .indexer import Indexer, IndexerArgs  # noqa: E402
from .ops import sparse_attention  # noqa: E402
from .patch import SparsePatch, patch_sparse_generate  # noqa: E402
from .presets import Preset, load_preset  # noqa: E402
from .saved import SavedCache, load_cache, save_cache  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BudgetKVCache",
    "FullKVCache",
    "Indexer",
    "IndexerArgs",
    "Preset",
    "SavedCache",
    "SparseConfig",
    "SparsePatch",
    "load_cache",
    "load_indexers",
    "load_preset",
    "patch_sparse_generate",
    "save_cache",
    "save_indexers",
    "sparse_attention",
]
