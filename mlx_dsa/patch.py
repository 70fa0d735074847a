"""Turn sparse attention on and off for an mlx-lm model."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .arrays import evaluate, is_imprecise
from .attention import SparseAttention
from .cache import ColdFile, RowsCache, SparseKVCache, make_cache
from .cache.callers import find_caller
from .cache.cold_file import claim
from .config import SparseConfig
from .crossovers import describe, lookup, plan_prefill, resolve_auto
from .dense import DenseAttention
from .families import Layer, family_of
from .files import HeldFile
from .indexer import Indexer
from .ops import check_backend
from .positions import PositionLimit
from .rules import EvictRule
from .search import Projections

# The sparse layer, counted from 1, at which the device starts on a chunk of a prompt: a
# GPU takes longer for these than Python for all that come after (docs/log.md).
_STARTS_AT = 4


class SparsePatch:
    """Hold a patched model; made by :func:`patch_sparse_generate`.

    As a context manager it restores the model on leaving. Called, it empties
    every cache that it has made.

    Attributes:
        config (SparseConfig): What the patch does, with ``"stream"`` in place of a
          prefill ``"auto"`` that takes it.
        layers (dict): Layer number to the :class:`SparseAttention` in its place.
        keeps_all (bool): Whether a layer with attention is left as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        indexers: Mapping[int, Indexer | Projections | None],
        config: SparseConfig,
        evict: EvictRule | None = None,
    ):
        self.config = config = resolve_auto(config, indexers)
        self._model = model
        # Each with an empty one as mlx-lm would make it.
        self._caches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._cold_file: ColdFile | None = None
        self._claimed: HeldFile | None = None  # the file that it is
        as_tuned = config.prefill == "auto" and config.select == SparseConfig.select
        plan = plan_prefill(lookup(describe(model, indexers, config)) if as_tuned else None, config)
        self._family = family_of(model)
        layers = self._family.layers(model)
        self.layers = {
            i: SparseAttention(layers[i], indexer and indexer.bind(layers[i]), config, plan, evict)
            for i, indexer in sorted(indexers.items())
            if i not in config.dense_layers
        }
        list(self.layers.values())[:_STARTS_AT][-1].starts = True
        self.keeps_all = not set(layers) <= set(self.layers)
        limit = PositionLimit(self._family.max_positions(model), of_text=self.keeps_all)
        next(iter(self.layers.values())).limit = limit
        self._dense = [DenseAttention(layer) for i, layer in layers.items() if i not in self.layers]
        rules = [sparse.selecting for sparse in self.layers.values()]
        for before, sparse in zip([None, *rules], self.layers.values()):
            sparse.selecting.follow(before)
            sparse.join()
        for put in (*self.layers.values(), *self._dense):
            put.layer.put(put)
        model.make_cache = self._make_cache_for_mlx_lm
        evaluate(model, *(x for x in indexers.values() if isinstance(x, nn.Module)))

    def make_cache(self) -> list[Any]:
        """Make an empty cache for each layer: what ``make_prompt_cache`` returns."""
        if self.config.cold_file is not None and self._cold_file is None:
            self._claimed = claim(Path(self.config.cold_file))
            self._cold_file = ColdFile(self.config.cold_file)
        caches = self._family.make_caches(self._model)
        for i in self.layers:
            caches[i] = make_cache(self.config, i, self._cold_file)
        self.adopt(caches)
        return caches

    def _make_cache_for_mlx_lm(self) -> list[Any]:
        # make_prompt_cache drops max_kv_size for a model that makes its own caches,
        # and passes nothing on: its frame is the only place that shows it was asked for.
        asked = find_caller("mlx_lm.models.cache", "make_prompt_cache")
        if asked is not None and asked.f_locals.get("max_kv_size") is not None:
            raise ValueError(
                "[SparsePatch] max_kv_size is not supported on a patched model. Leave "
                "it out: top_k is the number of entries that the cache keeps."
            )
        scoring = find_caller("mlx_lm.evaluate", "_score_fn", "_process_prompt")
        reads_whole_texts = scoring is not None and scoring.f_code.co_name == "_score_fn"
        drops = self.config.prefill == "stream"  # while it reads
        if reads_whole_texts and self.config.cache == "budget" and not drops:
            raise ValueError(
                "[SparsePatch] rolling log-likelihoods are read in one call, in which a "
                "budget evicts nothing: they would be those of a full cache. Use cache "
                "'full', or: mlx-dsa eval ppl"
            )
        caches = self.make_cache()
        if scoring is not None:
            for i in self.layers:
                caches[i].prompt.copies_decode = True
        return caches

    def adopt(self, caches: Sequence[Any]):
        """Count caches made elsewhere, such as loaded ones, among this patch's own.

        Args:
            caches (Sequence): One cache a layer.
        """
        for i, sparse in self.layers.items():
            if sparse.by_head:
                caches[i].rows_a_text = sparse.layer.n_kv_heads
            caches[i].merge = RowsCache
        empty = self._family.make_caches(self._model)
        self._caches.update(zip(caches, empty))

    def dense_modules(self) -> dict[str, nn.Module]:
        """Return the model's modules under the names they have unpatched."""
        return {
            name.replace(".self_attn.attention", ".self_attn"): module
            for name, module in self._model.named_modules()
            if not isinstance(module, (SparseAttention, DenseAttention)) and ".self_attn.indexer" not in name
        }

    def prune(self, caches: Sequence[Any]):
        """Cut caches to their budget now: the prompt is over, or no question is known yet.

        Args:
            caches (Sequence): One cache a layer, of this patch; those of dense layers
              and full caches keep what they have.
        """
        for i, layer in self.layers.items():
            if caches[i].evicts:
                layer.eviction.prune(caches[i])
            caches[i].prompt.end()
        # What was dropped can go, and another thread can go on.
        mx.eval([caches[i].contents for i in self.layers])

    def end_prompts(self, caches: Sequence[Any]):
        """Do what the next step of decode would: :meth:`prune` where a prompt has ended.

        Args:
            caches (Sequence): As there.
        """
        if all(caches[i].prompt.ended for i in self.layers):
            self.prune(caches)

    def misses_cold(self, caches: Sequence[Any]) -> bool:
        """Return whether a prompt would not be shown what is cold: a stream recalls nothing
        before a prompt's last token. Inside :meth:`decoding` each token has it recalled.

        Args:
            caches (Sequence): One cache a layer, of this patch.
        """
        return self.config.prefill == "stream" and any(caches[i].recalls and caches[i].split for i in self.layers)

    @contextmanager
    def reading(self, caches: Sequence[Any]) -> Iterator[None]:
        """Say that the calls inside are one prompt, however it is cut.

        Without it a call of one token ends the prompt, unless the caches' ``state`` is
        read after it. What was read is pruned at the end.

        Args:
            caches (Sequence): One cache a layer, of this patch.
        """
        with self._held(caches, "prompt"):
            yield
        self.prune(caches)

    @contextmanager
    def decoding(self, caches: Sequence[Any]) -> Iterator[None]:
        """Say that the calls inside are of decode, also those of several tokens.

        So a text that is known can be read as if it had been written, a token at a time.

        Args:
            caches (Sequence): One cache a layer, of this patch.
        """
        with self._held(caches, "decode"):
            yield

    @contextmanager
    def _held(self, caches, what) -> Iterator[None]:
        phases = [caches[i].prompt for i in self.layers]
        before = [phase.held for phase in phases]
        for phase in phases:
            phase.held = what
        try:
            yield
        finally:
            for phase, held in zip(phases, before):
                phase.held = held

    def clear(self):
        """Empty every cache that this patch has made."""
        for cache, empty in self._caches.items():
            if isinstance(cache, SparseKVCache):
                cache.reset()
            else:
                vars(cache).clear()
                vars(cache).update(vars(copy.deepcopy(empty)))

    def restore(self):
        """Put the model back as it was, and delete the patch's cold file."""
        for put in (*self.layers.values(), *self._dense):
            if put.layer.current is put:
                put.layer.put(put.attention)
        for sparse in self.layers.values():
            sparse.release()
        if self._claimed is not None:
            self._claimed.release()
            self._claimed = self._cold_file = None
        if getattr(self._model, "make_cache", None) == self._make_cache_for_mlx_lm:
            del self._model.make_cache

    def __call__(self):
        self.clear()

    def __enter__(self) -> SparsePatch:
        return self

    def __exit__(self, *exception):
        self.restore()


def is_patched(layers: Mapping[int, Layer]) -> bool:
    """Return whether a model's layers have sparse attention."""
    return any(isinstance(layer.current, SparseAttention) for layer in layers.values())


def patch_of(model: nn.Module) -> SparsePatch | None:
    """Return the patch that is in force on a model, if there is one."""
    owner = getattr(getattr(model, "make_cache", None), "__self__", None)
    return owner if isinstance(owner, SparsePatch) else None


def patch_sparse_generate(
    model: nn.Module,
    indexers: Mapping[int, Indexer | Projections | None] | None,
    top_k: int = 2048,
    *,
    evict_rule: EvictRule | None = None,
    **config: Any,
) -> SparsePatch:
    """Give a model learned sparse attention, at once, until it is restored.

    mlx-lm's ``generate``, ``stream_generate`` and ``generate_step`` then use it.
    The weights keep their values (the matrices of a layer's queries, keys and values
    come to lie in one array). Parameter names change, so load before patching and
    don't save a patched model.

    Args:
        model (nn.Module): A model of mlx-lm, of a family that :mod:`mlx_dsa.families` knows.
        indexers (Mapping, optional): Layer number to :class:`Indexer`; a layer without one
          stays dense. ``None`` where no rule reads one: every layer is sparse.
        top_k (int): Keys that a query attends to. Default: ``2048``.
        evict_rule (EvictRule, optional): A rule that has no name, in place of ``evict``
          ``"window"``. Default: ``None``.
        **config: Further fields of :class:`SparseConfig`.

    Returns:
        SparsePatch: To restore the model, and to clear its caches.

    Raises:
        ValueError: If the model is of another type or is already patched, the
          indexers don't fit it, or a field is unknown or not valid.
    """
    sparse = SparseConfig.from_dict({"top_k": top_k, **config})
    check_backend(sparse.backend)
    layers = family_of(model).layers(model)
    if is_patched(layers):
        raise ValueError("[patch_sparse_generate] 'model' is already patched. Call restore() of that patch first.")
    if indexers is None:
        indexers = dict.fromkeys(layers)
    if evict_rule is not None and (sparse.evict != "window" or evict_rule.by_head or evict_rule.merges):
        raise ValueError(
            "[patch_sparse_generate] 'evict_rule' stands in for evict='window', by layer and without "
            "merging. Set that, or register the rule and name it."
        )
    if sparse.wants_indexers and None in indexers.values():
        rules = " and ".join(map(repr, sparse.reading_indexers))
        raise ValueError(
            f"[patch_sparse_generate] 'indexers' must be given for {rules}, which reads them. "
            f"Give them, or choose a select and an evict rule that need none."
        )
    n_layers = len(model.layers)
    beyond = [i for i in (*indexers, *sparse.dense_layers) if not 0 <= i < n_layers]
    if beyond:
        raise ValueError(
            f"[patch_sparse_generate] the model's layers are 0 to {n_layers - 1} but got layer {beyond[0]}."
        )
    without = [i for i in indexers if i not in layers]
    if without:
        raise ValueError(
            f"[patch_sparse_generate] 'indexers' must be for layers with attention, "
            f"{', '.join(map(str, layers))}, but got layer {without[0]}."
        )
    if not set(indexers) - set(sparse.dense_layers):
        raise ValueError(
            "[patch_sparse_generate] 'indexers' must hold at least one layer that is "
            "not in dense_layers: nothing would be sparse."
        )
    _warn(next(iter(layers.values())).dtype, indexers, sparse)
    return SparsePatch(model, indexers, sparse, evict_rule)


def _warn(dtype: mx.Dtype, indexers: Mapping[int, Any], config: SparseConfig):
    """Tell what will answer worse than it need."""
    if config.wants_heads:
        if not all(indexer.has_retention for indexer in indexers.values()):
            while_reading = config.prefill == "stream"
            also = ", and more again at every cut" if while_reading else ""
            told = (
                f"the budget keeps the keys least like the others (KeyDiff), which loses more "
                f"facts than trained heads do{also}. Use cache='full', or train the heads."
            )
            if config.cache == "tiered":
                told = (
                    "while a text is read, what stays at hand is the keys least like the others "
                    "(KeyDiff), which is worse than what trained heads choose."
                )
            warnings.warn(
                f"[patch_sparse_generate] these indexers have no retention head: {told}",
                stacklevel=3,
            )
    if is_imprecise(dtype):
        name = str(dtype).rpartition(".")[2]
        warnings.warn(
            f"[patch_sparse_generate] on a CPU MLX adds products of {name} up in {name}: "
            f"answers are worse. Call model.set_dtype(mx.float32) before patching.",
            stacklevel=3,
        )
