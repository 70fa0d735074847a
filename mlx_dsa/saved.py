"""Caches on disk: a document that was read once, to be asked often."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from .cache import BudgetKVCache, FullKVCache
from .maker import check_maker, maker_of
from .patch import SparsePatch
from .saved_before import FORMATS, named_contents
from .sealed import Damaged, NotSealed, peek_sealed, read_sealed, write_sealed

_CLASSES: dict[str, type[Any]] = {c.__name__: c for c in (BudgetKVCache, FullKVCache, KVCache, ArraysCache)}
_FORMAT = "mlx-dsa cache 6"
PART = "mlx-dsa part"  # how the format of what is half read begins
# What a kept cache depends on; how it was computed may differ.
KEPT_BY = ("top_k", "cache", "n_sink", "n_recent", "select", "evict", "dense_layers")
KEPT_BY += ("positions",)
# And so does this, where a prompt is cut while it is read.
_STREAMED_BY = ("prefill", "stream_chunk")
_OLD_FORMAT = re.compile(rb'"format":"mlx-dsa cache [12]"')
_AGAIN = "Make it again: mlx-dsa compress, or save_cache."


def kept_by(*configs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that decide what caches hold.

    Args:
        configs (Mapping): Fields of :class:`SparseConfig`, or some of them.

    Returns:
        tuple of str: Those in which all the configs must agree.
    """
    streams = any(config.get("prefill") == "stream" for config in configs)
    return KEPT_BY + _STREAMED_BY if streams else KEPT_BY


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


class SavedSettings(NamedTuple):
    """What :func:`read_saved` returns.

    Args:
        path (Path): The file.
        config (dict): Fields of :class:`SparseConfig`, for ``SparseConfig.from_dict``.
        metadata (dict): Strings that were saved with it.
        tokens (int): Tokens that were read.
    """

    path: Path
    config: dict[str, Any]
    metadata: dict[str, str]
    tokens: int


def save_cache(
    path: str | os.PathLike,
    caches: Sequence[Any],
    patch: SparsePatch,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Save the caches of a patched model, as a whole file or not at all.

    Where a prompt has just ended they are pruned first, as the next step would do.

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
    return write_saved(path, *pack_saved(caches, patch, metadata))


def pack_saved(
    caches: Sequence[Any],
    patch: SparsePatch,
    metadata: Mapping[str, str] | None = None,
    maker: Mapping[str, Any] | None = None,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Make what :func:`save_cache` writes, for :func:`write_saved`.

    Args:
        caches, patch, metadata: As there.
        maker (Mapping, optional): ``maker_of(patch)``, where it is known: making it reads
          all weights. Default: ``None``.

    Returns:
        tuple: Arrays, and strings for the header.
    """
    patch.end_prompts(caches)
    arrays, packed = pack_caches(caches, "save_cache")
    header = {
        "format": _FORMAT,
        "made by": json.dumps(maker or maker_of(patch)),
        "config": json.dumps(dataclasses.asdict(patch.config)),
        **packed,
        "tokens": str(caches[min(patch.layers)].offset),
        "metadata": json.dumps(dict(metadata or {})),
    }
    return arrays, header


def write_saved(path: str | os.PathLike, arrays: Mapping[str, mx.array], header: Mapping[str, str]) -> Path:
    """Write what :func:`pack_saved` made: see :func:`save_cache`."""
    path = Path(path)
    try:
        write_sealed(path, arrays, header)
    except (OSError, RuntimeError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise ValueError(
            f"[save_cache] {path} can't be written: {reason}. Free some space, or name a file in another folder."
        ) from None
    return path


def load_cache(path: str | os.PathLike, patch: SparsePatch, maker: Mapping[str, Any] | None = None) -> SavedCache:
    """Load caches for a patched model, to go on where they were saved.

    Args:
        path (str or PathLike): A file of :func:`save_cache`.
        patch (SparsePatch): A patch of the same model, with the same indexers and
          the same settings of what a cache keeps.
        maker (Mapping, optional): As in :func:`pack_saved`. Default: ``None``.

    Returns:
        SavedCache: The caches, the tokens read, and the metadata.

    Raises:
        ValueError: If the file is missing, damaged or of another kind, or was made
          with another model, other indexers or other settings.
    """
    path = Path(path)
    arrays, header = _read(path)
    _check_config(path, _settings_of(header), patch)
    check_maker(path, json.loads(header["made by"]), maker or maker_of(patch))
    caches = unpack_caches(arrays, header)
    patch.adopt(caches)
    return SavedCache(caches, int(header["tokens"]), json.loads(header["metadata"]))


def peek_saved(path: str | os.PathLike, patch: SparsePatch, maker: Mapping[str, Any]) -> dict[str, str]:
    """Read what was saved with a cache, and verify nothing yet.

    Args:
        path, patch, maker: As in :func:`load_cache`.

    Returns:
        dict: The metadata.

    Raises:
        ValueError: If the file is of another kind, or was made with another model, other
          indexers or other settings.
    """
    path = Path(path)
    try:
        header = peek_sealed(path)
        if header.get("format") != _FORMAT:
            raise NotSealed
        _check_config(path, _settings_of(header), patch)
        check_maker(path, json.loads(header["made by"]), maker)
        return {str(name): str(value) for name, value in json.loads(header["metadata"]).items()}
    except OSError as error:
        raise ValueError(f"[load_cache] {path} can't be read: {error.strerror}.") from None
    except (NotSealed, KeyError, TypeError, AttributeError):
        raise ValueError(f"[load_cache] {path} is not a cache that this version saved, or is damaged.") from None


def read_saved(path: str | os.PathLike) -> SavedSettings:
    """Read with what a cache was saved, before any model is loaded.

    Args:
        path (str or PathLike): A file of :func:`save_cache`.

    Returns:
        SavedSettings: Its settings, metadata and number of tokens.

    Raises:
        ValueError: If the file is missing, damaged or of another kind.
    """
    path = Path(path)
    header = _read(path)[1]
    config, metadata = _settings_of(header), json.loads(header["metadata"])
    return SavedSettings(path, config, metadata, int(header["tokens"]))


def _settings_of(header: Mapping[str, str]) -> dict[str, Any]:
    # Files from before there were other positions, and other rules, don't name theirs.
    return {"positions": "absolute", "select": "lightning", **json.loads(header["config"])}


def pack_caches(caches: Sequence[Any], where: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Put caches as they are into what a sealed file takes.

    Args:
        caches (Sequence): One cache a layer.
        where (str): Who asks, for the message.

    Returns:
        tuple: Arrays, and strings for the header.

    Raises:
        ValueError: If one is empty or of a kind that can't be saved.
    """
    arrays: dict[str, mx.array] = {}
    scalars: dict[str, Any] = {}
    classes = []
    for layer, cache in enumerate(caches):
        name = type(cache).__name__
        if name not in _CLASSES:
            raise ValueError(f"[{where}] a {name} can't be saved. Use cache 'budget' or 'full'.")
        if cache.empty():
            raise ValueError(f"[{where}] 'caches' are empty: read a text first.")
        classes.append(name)
        for of, value in _contents_of(cache).items():
            place: dict[str, Any] = arrays if isinstance(value, mx.array) else scalars
            place[f"{layer}.{of}"] = value
    return arrays, {"classes": json.dumps(classes), "scalars": json.dumps(scalars)}


def unpack_caches(arrays: Mapping[str, mx.array], header: Mapping[str, str]) -> list[Any]:
    """Rebuild caches from what :func:`pack_caches` gave.

    Args:
        arrays (Mapping): Its arrays; there may be others.
        header (Mapping): Its strings, likewise.

    Returns:
        list: One cache a layer, in memory.
    """
    held: dict[int, dict[str, Any]] = {}
    for key, value in {**arrays, **json.loads(header["scalars"])}.items():
        layer, found, of = key.partition(".")
        if found and layer.isdecimal():
            held.setdefault(int(layer), {})[of] = value
    caches = []
    for i, name in enumerate(json.loads(header["classes"])):
        contents = named_contents(name, held[i], header["format"]) if header["format"] in FORMATS else held[i]
        caches.append(_rebuilt(name, contents))
    # All of it, in this thread: what is lazy belongs to it.
    mx.eval([_contents_of(cache) for cache in caches])
    return caches


def _contents_of(cache: Any) -> dict[str, Any]:
    if isinstance(cache, KVCache):  # whose state differs by version of mlx-lm
        seen = slice(cache.offset)
        assert cache.keys is not None and cache.values is not None  # none of these is empty
        return {"keys": cache.keys[..., seen, :], "values": cache.values[..., seen, :], "offset": cache.offset}
    if isinstance(cache, ArraysCache):  # of a layer without attention
        return {str(i): a for i, a in enumerate(cache.cache)}
    return cache.contents


def _rebuilt(name: str, contents: Mapping[str, Any]) -> Any:
    if name == KVCache.__name__:
        dense = KVCache()
        dense.keys, dense.values, dense.offset = (contents[n] for n in ("keys", "values", "offset"))
        return dense
    if name == ArraysCache.__name__:
        linear = ArraysCache(len(contents))
        linear.cache = [contents[str(i)] for i in range(len(contents))]
        return linear
    cache = BudgetKVCache(1) if name == BudgetKVCache.__name__ else _CLASSES[name]()
    cache.contents = contents
    return cache


def _check_config(path: Path, stored: Mapping[str, Any], patch: SparsePatch):
    mine = json.loads(json.dumps(dataclasses.asdict(patch.config)))
    for name in kept_by(stored, mine):
        if stored.get(name) != mine[name]:
            wanted = stored.get(name)
            if (name, wanted) == ("prefill", "auto"):  # which is "stream" here, not there
                wanted = "tile, exact or dense"
            raise ValueError(
                f"[load_cache] {path} was made with {name} = {stored.get(name)} but the "
                f"patch has {mine[name]}. Set {name} to {wanted}."
            )


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"[load_cache] there is no file {path}.")
    try:
        arrays, header = read_sealed(path)
    except NotSealed:
        raise ValueError(f"[load_cache] {path} {_what_it_is(path)}") from None
    except Damaged:
        raise ValueError(f"[load_cache] {path} is damaged. {_AGAIN}") from None
    except OSError as error:
        raise ValueError(f"[load_cache] {path} can't be read: {error.strerror}.") from None
    if str(header.get("format")).startswith(PART):
        raise ValueError(
            f"[load_cache] {path} is of a document that is half read. Run the same mlx-dsa "
            f"compress again, which goes on from there."
        )
    if header.get("format") not in (_FORMAT, *FORMATS):
        raise ValueError(f"[load_cache] {path} was saved by another version of mlx-dsa. {_AGAIN}")
    return arrays, header


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        if _OLD_FORMAT.search(file.read(1 << 20)):
            return f"was saved by an earlier version of mlx-dsa. {_AGAIN}"
    return f"is not a cache that mlx-dsa saved, or is damaged. {_AGAIN}"
