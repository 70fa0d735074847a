"""The one model that a server has, as mlx-lm's server asks for it."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import SparseConfig
from ..patch import SparsePatch, patch_sparse_generate
from ..presets import Settings, load_model, load_settings
from ..reach import Reach, reach_of
from .options import ServeOptions


class Provider:
    """Stand in for mlx-lm's ``ModelProvider``: nothing that a request says loads anything.

    It is made in any thread, since loading and patching evaluate every array.

    Args:
        model (nn.Module): The model, patched or dense.
        tokenizer (TokenizerWrapper): Its tokenizer.
        name (str): The name under which it is served.
        options (ServeOptions): How the server is set up.
        patch (SparsePatch, optional): Undone when the server ends. Default: ``None``.
    """

    processor = draft_model = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        name: str,
        options: ServeOptions,
        patch: SparsePatch | None = None,
    ):
        self.name = name
        self.patch = patch
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.cli_args = options.arguments(name)
        self.model_key = (name, None, None)
        self.reach: Reach = reach_of(model)
        caches = make_prompt_cache(model)
        # Whether conversations can be rows of one batch.
        self.is_batchable = all(hasattr(cache, "merge") for cache in caches)
        self.vocab_size = _vocab_size(model, tokenizer)
        self.token_bytes = token_bytes(model)

    @property
    def config(self) -> SparseConfig | None:
        """How the model is sparse; ``None`` for a dense one."""
        return self.patch.config if self.patch is not None else None

    def reset(self) -> None:
        """Let the model go. Called in the thread that ran it."""
        if self.patch is not None:
            self.patch.restore()
        self.model = self.tokenizer = self.patch = None
        self.is_batchable = False


def open_provider(settings: Settings, name: str, options: ServeOptions, dense: bool = False) -> Provider:
    """Load a model and patch it.

    Args:
        settings (Settings): What to load.
        name (str): The name under which it is served.
        options (ServeOptions): How the server is set up.
        dense (bool): Leave the model as it is. Default: ``False``.

    Returns:
        Provider: The model for a server.

    Raises:
        ValueError: If something can't be loaded.
    """
    if dense:
        model, tokenizer = load_model(settings.model)
        return Provider(model, tokenizer, name, options)
    preset = load_settings(settings)
    patch = patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config))
    return Provider(preset.model, preset.tokenizer, name, options, patch)


def token_bytes(model: nn.Module) -> int:
    """Return the bytes of a token's keys and values over all layers, as far as the model says.

    Args:
        model (nn.Module): From mlx-lm.
    """
    args: Any = getattr(model, "args", None)
    heads = getattr(args, "num_key_value_heads", None) or getattr(args, "num_attention_heads", None)
    if not heads:
        return 0
    size = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    dtypes = [p.dtype.size for name, p in _parameters(model) if name.endswith("norm.weight")]
    return 2 * heads * size * len(model.layers) * max(dtypes, default=2)


def dense_bytes(token_nbytes: int, n_tokens: int) -> int:
    """Return the bytes of some tokens in mlx-lm's own caches, without their room to grow: what
    is told of ours has none either."""
    return n_tokens * token_nbytes


def _parameters(model: nn.Module) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(model.parameters()))


def _vocab_size(model: nn.Module, tokenizer: TokenizerWrapper) -> int:
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    return size if isinstance(size, int) else len(tokenizer._tokenizer)
