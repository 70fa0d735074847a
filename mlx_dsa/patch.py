"""Turn sparse attention on and off for an mlx-lm model."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from .attention import SparseAttention
from .cache import BudgetKVCache, FullKVCache
from .config import SparseConfig
from .crossovers import describe, lookup, plan_prefill
from .files import HeldFile
from .indexer import Indexer
from .ops import check_backend

_MODEL_TYPES = ("qwen3", "qwen3_moe")
# The sparse layer, counted from 1, at which the device starts on a chunk of a prompt: a
# GPU takes longer for these than Python for all that come after (docs/log.md).
_STARTS_AT = 4
# What a cold file begins with: one of ours, not a user's.
_COLD_MARK = b"mlx-dsa cold file\n"


class SparsePatch:
    """Hold a patched model; made by :func:`patch_sparse_generate`.

    As a context manager it restores the model on leaving. Called, it empties
    every cache that it has made.

    Attributes:
        config (SparseConfig): What the patch does.
        layers (dict): Layer number to the :class:`SparseAttention` in its place.
    """

    def __init__(
        self, model: nn.Module, indexers: Mapping[int, Indexer], config: SparseConfig
    ):
        self.config = config
        self._model = model
        self._caches: weakref.WeakSet = weakref.WeakSet()
        self._cold_file: HeldFile | None = None
        found = None
        if config.prefill == "auto":
            found = lookup(describe(model, indexers, config))
        plan = plan_prefill(found, config)
        self.layers = {
            i: SparseAttention(
                model.layers[i].self_attn,
                indexer.bind(model.args, model.layers[i].input_layernorm.weight.dtype),
                config,
                plan,
            )
            for i, indexer in sorted(indexers.items())
            if i not in config.dense_layers
        }
        list(self.layers.values())[:_STARTS_AT][-1].starts = True
        for i, layer in self.layers.items():
            model.layers[i].self_attn = layer
        model.make_cache = self._make_cache_for_mlx_lm

    def make_cache(self) -> list[Any]:
        """Make an empty cache for each layer: what ``make_prompt_cache`` returns."""
        if self.config.cold_file is not None:
            self._claim_cold_file(Path(self.config.cold_file))
        caches = [
            self.layers[i].make_cache(i) if i in self.layers else KVCache()
            for i in range(len(self._model.layers))
        ]
        self._caches.update(caches)
        return caches

    def _claim_cold_file(self, path: Path):
        if self._cold_file is None:
            self._cold_file = _claim(path)
        elif any(not cache.empty() for cache in self._caches):
            raise ValueError(
                "[SparsePatch] 'cold_file' holds another conversation of this patch. "
                "Call the patch to clear it first."
            )

    def _make_cache_for_mlx_lm(self) -> list[Any]:
        # make_prompt_cache drops max_kv_size for a model that makes its own caches,
        # and passes nothing on: its frame is the only place that shows it was asked for.
        caller = inspect.currentframe().f_back
        if caller is not None and caller.f_locals.get("max_kv_size") is not None:
            raise ValueError(
                "[SparsePatch] max_kv_size is not supported on a patched model. Leave "
                "it out: top_k is the number of entries that the cache keeps."
            )
        return self.make_cache()

    def adopt(self, caches: Sequence[Any]):
        """Count caches made elsewhere, such as loaded ones, among this patch's own.

        Args:
            caches (Sequence): One cache a layer.
        """
        self._caches.update(caches)

    def dense_modules(self) -> dict[str, nn.Module]:
        """Return the model's modules under the names they have unpatched."""
        return {
            name.replace(".self_attn.attention", ".self_attn"): module
            for name, module in self._model.named_modules()
            if not isinstance(module, SparseAttention) and ".self_attn.indexer" not in name
        }

    def prune(self, caches: Sequence[Any]):
        """Cut caches to their budget now, before any question is known.

        Args:
            caches (Sequence): One cache a layer, of this patch; those of dense layers
              and full caches stay as they are.
        """
        for i, layer in self.layers.items():
            if isinstance(caches[i], BudgetKVCache):
                layer.eviction.prune(caches[i])

    def clear(self):
        """Empty every cache that this patch has made."""
        for cache in self._caches:
            if isinstance(cache, FullKVCache):
                cache.reset()
            else:
                cache.keys = cache.values = None
                cache.offset = 0

    def restore(self):
        """Put the model back as it was, and delete the patch's cold file."""
        for i, layer in self.layers.items():
            if self._model.layers[i].self_attn is layer:
                self._model.layers[i].self_attn = layer.attention
            layer.release()
        if self._cold_file is not None:
            self._cold_file.release()
            self._cold_file = None
        if getattr(self._model, "make_cache", None) == self._make_cache_for_mlx_lm:
            del self._model.make_cache

    def __call__(self):
        self.clear()

    def __enter__(self) -> SparsePatch:
        return self

    def __exit__(self, *exception):
        self.restore()


def _claim(path: Path) -> HeldFile:
    """Make a new cold file, in place of one that a killed process left."""
    try:
        return HeldFile(path, _COLD_MARK)
    except BlockingIOError:
        raise ValueError(
            f"[SparsePatch] 'cold_file' {path} is in use by another run. Name another file."
        ) from None
    except FileExistsError:
        raise ValueError(
            f"[SparsePatch] 'cold_file' {path} exists and is not overwritten. Name a new "
            f"file, or delete it."
        ) from None
    except OSError as error:
        raise ValueError(
            f"[SparsePatch] 'cold_file' {path} can't be made: {error.strerror}."
        ) from None


def patch_sparse_generate(
    model: nn.Module,
    indexers: Mapping[int, Indexer],
    top_k: int = 2048,
    **config: Any,
) -> SparsePatch:
    """Give a model learned sparse attention, at once, until it is restored.

    mlx-lm's ``generate``, ``stream_generate`` and ``generate_step`` then use it.
    The weights keep their values (the matrices of a layer's queries, keys and values
    come to lie in one array). Parameter names change, so load before patching and
    don't save a patched model.

    Args:
        model (nn.Module): A Qwen3 or Qwen3-MoE model of mlx-lm.
        indexers (Mapping): Layer number to :class:`Indexer`; a layer without one
          stays dense.
        top_k (int): Keys that a query attends to. Default: ``2048``.
        **config: Further fields of :class:`SparseConfig`.

    Returns:
        SparsePatch: To restore the model, and to clear its caches.

    Raises:
        ValueError: If the model is of another type or is already patched, the
          indexers don't fit it, or a field is unknown or not valid.
    """
    sparse = SparseConfig.from_dict({"top_k": top_k, **config})
    check_backend(sparse.backend)
    model_type = getattr(model, "model_type", type(model).__name__)
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"[patch_sparse_generate] 'model' must be of type "
            f"{' or '.join(_MODEL_TYPES)} but got {model_type!r}."
        )
    if any(isinstance(layer.self_attn, SparseAttention) for layer in model.layers):
        raise ValueError(
            "[patch_sparse_generate] 'model' is already patched. Call restore() of "
            "that patch first."
        )
    n_layers = len(model.layers)
    beyond = [i for i in (*indexers, *sparse.dense_layers) if not 0 <= i < n_layers]
    if beyond:
        raise ValueError(
            f"[patch_sparse_generate] the model's layers are 0 to {n_layers - 1} but "
            f"got layer {beyond[0]}."
        )
    if not set(indexers) - set(sparse.dense_layers):
        raise ValueError(
            "[patch_sparse_generate] 'indexers' must hold at least one layer that is "
            "not in dense_layers: nothing would be sparse."
        )
    if sparse.cache == "budget" and sparse.evict == "retention":
        without = [i for i, indexer in indexers.items() if not indexer.has_retention]
        if without:
            warnings.warn(
                "[patch_sparse_generate] these indexers have no retention head: the "
                "budget evicts by index scores, which lose facts that no question has "
                "asked for yet. Use cache='full', or train the heads.",
                stacklevel=2,
            )
    return SparsePatch(model, indexers, sparse)
