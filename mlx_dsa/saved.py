"""Caches on disk: a document that was read once, to be asked often."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from safetensors import SafetensorError, safe_open

from .cache import BudgetKVCache, FullKVCache
from .files import replacing
from .patch import SparsePatch

_CLASSES = {c.__name__: c for c in (BudgetKVCache, FullKVCache, KVCache)}
_FORMAT = "mlx-dsa cache 2"
# What a kept cache depends on; how it was computed may differ.
_KEPT_BY = ("top_k", "cache", "n_sink", "n_recent", "evict", "dense_layers")


class SavedCache(NamedTuple):
    """What :func:`load_cache` returns.

    Args:
        caches (list): One cache a layer, for ``prompt_cache`` of mlx-lm.
        tokens (int): Tokens that were read.
        metadata (dict): Strings that were saved with it.
    """

    caches: list[Any]
    tokens: int
    metadata: dict[str, str]


def save_cache(
    path: str | os.PathLike,
    caches: Sequence[Any],
    patch: SparsePatch,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Save the caches of a patched model, as a whole file or not at all.

    Args:
        path (str or PathLike): The file; one that exists is replaced in one step.
        caches (Sequence): One cache a layer, from ``make_prompt_cache``.
        patch (SparsePatch): The patch of the model that filled them.
        metadata (Mapping, optional): Strings to keep with it. Default: ``None``.

    Returns:
        Path: The file.

    Raises:
        ValueError: If the caches are empty or of a kind that can't be saved, or
          the file can't be written.
    """
    arrays, scalars, classes = {}, {}, []
    for layer, cache in enumerate(caches):
        name = type(cache).__name__
        if name not in _CLASSES:
            raise ValueError(
                f"[save_cache] a {name} can't be saved. Use cache 'budget' or 'full'."
            )
        if cache.empty():
            raise ValueError("[save_cache] 'caches' are empty: read a text first.")
        classes.append(name)
        for i, value in enumerate(cache.state):
            where = arrays if isinstance(value, mx.array) else scalars
            where[f"{layer}.{i}"] = value
    header = {
        "format": _FORMAT,
        **_fingerprints(patch),
        "config": json.dumps(_kept_by(patch)),
        "classes": json.dumps(classes),
        "scalars": json.dumps(scalars),
        "tokens": str(caches[0].offset),
        "metadata": json.dumps(dict(metadata or {})),
    }
    path = Path(path)
    try:
        with replacing(path, suffix=".safetensors", shared=True) as part:
            mx.save_safetensors(str(part), arrays, header)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"[save_cache] {path} can't be written: {error}") from None
    return path


def load_cache(path: str | os.PathLike, patch: SparsePatch) -> SavedCache:
    """Load caches for a patched model, to go on where they were saved.

    Args:
        path (str or PathLike): A file of :func:`save_cache`.
        patch (SparsePatch): A patch of the same model, with the same indexers and
          the same settings of what a cache keeps.

    Returns:
        SavedCache: The caches, the tokens read, and the metadata.

    Raises:
        ValueError: If the file is missing, damaged or of another kind, or was made
          with another model, other indexers or other settings.
    """
    path = Path(path)
    header = _read_header(path)
    for name, mine in _fingerprints(patch).items():
        if header[name] != mine:
            raise ValueError(
                f"[load_cache] {path} was made with other {name} weights. Load those, or "
                f"make the cache again."
            )
    stored, mine = json.loads(header["config"]), _kept_by(patch)
    for name in _KEPT_BY:
        if stored.get(name) != mine[name]:
            raise ValueError(
                f"[load_cache] {path} was made with {name} = {stored.get(name)} but the "
                f"patch has {mine[name]}. Set {name} to {stored.get(name)}."
            )
    arrays = mx.load(str(path), format="safetensors")
    scalars = json.loads(header["scalars"])
    caches = []
    for layer, name in enumerate(json.loads(header["classes"])):
        state, i = [], 0
        while (key := f"{layer}.{i}") in arrays or key in scalars:
            state.append(arrays[key] if key in arrays else scalars[key])
            i += 1
        # Not from_state, which differs by version of mlx-lm.
        cache = BudgetKVCache(1) if name == "BudgetKVCache" else _CLASSES[name]()
        cache.state = state
        caches.append(cache)
    mx.eval([cache.state for cache in caches])
    patch.adopt(caches)
    return SavedCache(caches, int(header["tokens"]), json.loads(header["metadata"]))


def _fingerprint(parameters: Mapping[str, Any]) -> str:
    """Identify weights by their names, shapes, dtypes and a sample of their bits.

    Args:
        parameters (Mapping): A tree of arrays, as ``module.parameters()`` gives it.

    Returns:
        str: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(parameters)):
        sample = array.reshape(-1)
        step = max(1, sample.size // 64)
        sample = np.array(sample[::step][:64].view(mx.uint8))
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def _fingerprints(patch: SparsePatch) -> dict[str, str]:
    indexers = {str(i): layer.indexer.parameters() for i, layer in patch.layers.items()}
    return {
        "model": _fingerprint(patch.dense_parameters()),
        "indexer": _fingerprint(indexers),
    }


def _kept_by(patch: SparsePatch) -> dict[str, Any]:
    config = dataclasses.asdict(patch.config)
    return {name: json.loads(json.dumps(config[name])) for name in _KEPT_BY}


def _read_header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"[load_cache] there is no file {path}.")
    try:
        # mx.load reads lazily and would find a short file only in use.
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"[load_cache] {path} is damaged or not a cache ({error}). Make it again."
        ) from None
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"[load_cache] {path} is not a cache that this version of mlx-dsa saved."
        )
    return header
