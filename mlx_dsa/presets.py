"""Names of ready settings -> model, indexers, config."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .arrays import evaluate
from .calibrated import Calibration, load_calibration
from .checkpoint import has_heads, load_indexers
from .checkpoint_file import CALIBRATED, INDEXERS, PROJECTIONS
from .config import SparseConfig, override
from .families import family_of
from .gguf import read_metadata
from .hub import INDEXER_FILES, check_place, fetch, first_line, flawed_json, is_repository, read_object
from .indexer import Indexer
from .machine import runs_float32
from .registry import make_rule
from .rules.sparsek import sparsek_settings, with_model_settings
from .search import Projections, load_projections

_PACKAGE = Path(__file__).resolve().parent
_LOADED = ("model", "indexer")
_PATHS = (*_LOADED, "cold_file")


class Settings(NamedTuple):
    """What to load and how to run it, before anything is loaded.

    Args:
        model (str): Folder or hub repository of the model.
        indexer (str, optional): File, folder or hub repository of its indexers.
        config (SparseConfig): How to run them.
    """

    model: str
    indexer: str | None
    config: SparseConfig


class Preset(NamedTuple):
    """A loaded model with its tokenizer, indexers and config.

    ``indexers`` has a layer's :class:`Indexer`, or what else its rules read; ``None`` where
    they read nothing.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    indexers: dict[int, Any]
    config: SparseConfig


def resource(name: str) -> Path:
    """Find a shipped file or folder, in a wheel or in a checkout.

    Args:
        name (str): Its path from the root of the repository.

    Returns:
        Path: Where it is.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"[mlx-dsa] {name} is not in this installation. Install the package again.")


def preset_names() -> list[str]:
    """Return the names of the presets, the default first."""
    names = (file.stem for file in resource("configs").glob("*.json"))
    return sorted(names, key=lambda name: (name != "tiny", name))


def read_preset(name: str) -> dict[str, Any]:
    """Read a preset's settings.

    Args:
        name (str): A name from :func:`preset_names`.

    Returns:
        dict: ``model``, ``indexer`` where one is published, and fields of
        :class:`SparseConfig`.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in preset_names():
        raise ValueError(f"[load_preset] 'name' must be one of {', '.join(preset_names())} but got {name!r}.")
    return read_settings(resource(f"configs/{name}.json"))


def read_settings(file: str | os.PathLike) -> dict[str, Any]:
    """Read settings from a JSON file.

    Args:
        file (str or PathLike): A JSON object with the keys of a preset. Paths in
          it (``model``, ``indexer``, ``cold_file``) are relative to the file.

    Returns:
        dict: The settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a JSON object, a key is unknown, or a path is no text.
    """
    file = Path(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[config] {file} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"[config] {file} must hold a JSON object.")
    keys = [*_LOADED, *(field.name for field in fields(SparseConfig))]
    unknown = [key for key in values if key not in keys]
    if unknown:
        raise ValueError(f"[config] unknown key {unknown[0]!r} in {file}: the keys are {', '.join(keys)}.")
    for key in _PATHS:
        if values.get(key) is None:
            continue
        if not isinstance(values[key], str):
            raise ValueError(f"[config] {key!r} in {file} must be a text.")
        path = file.parent / Path(values[key]).expanduser()
        if key == "cold_file" or path.exists() or not is_repository(values[key]):
            values[key] = os.path.normpath(path)
    return values


def preset_of(model: str) -> str | None:
    """Find the preset of a model.

    Args:
        model (str): A hub repository, or a folder: also the one that the hub's
          cache keeps the repository in.

    Returns:
        str, optional: The preset's name, or ``None`` if it is in no preset.
    """
    folder = Path(model).expanduser().resolve()
    for name in preset_names():
        known = read_preset(name)["model"]
        cached = f"models--{known.replace('/', '--')}"
        if model == known or folder == Path(known).resolve() or cached in folder.parts:
            return name
    return None


def resolve(name: str | None = "tiny", **overrides: Any) -> Settings:
    """Merge a preset and what overrides it into settings.

    Args:
        name (str, optional): A preset, or ``None`` for that of the model; a model
          that is in none gets the defaults of :class:`SparseConfig`, and the indexers
          in its own folder. Default: ``"tiny"``.
        overrides: ``model``, ``indexer`` and fields of :class:`SparseConfig`. With
          ``top_k`` alone, ``n_recent`` is at most half of it. With ``select``
          ``"sparsek"``, what the model's own folder says of it stands under these.

    Returns:
        Settings: The merged settings.

    Raises:
        ValueError: If the preset or a key is unknown, a value is not valid, or
          no model is named.
    """
    own = str(overrides.get("model") or "")
    name = name or (preset_of(own) if own else None)
    values = {"n_recent": SparseConfig.n_recent, **(read_preset(name) if name else {})}
    beside = Path(own).expanduser() / INDEXERS
    if own and beside.is_file():
        values["indexer"] = beside
    if own and str(overrides.get("select")).partition(":")[0] == "sparsek":
        said = _said_of_sparsek(Path(own).expanduser())
        if said is not None:
            said = with_model_settings(overrides["select"], said)
            overrides = {**said, **overrides, "select": said["select"]}
    values = override(values, overrides)
    model, indexer = (values.pop(key, None) for key in _LOADED)
    if not model:
        raise ValueError("[mlx-dsa] no model is named: give 'model', or a preset.")
    return Settings(str(model), indexer and str(indexer), SparseConfig.from_dict(values))


def _said_of_sparsek(model: Path) -> dict[str, Any] | None:
    """Return what a folder's ``config.json``, or else its GGUF file, says of SparseK."""
    config = model / "config.json"
    said = sparsek_settings(read_object(config)) if config.is_file() else None
    for file in sorted(model.glob("*.gguf"))[:1] if said is None else ():
        said = sparsek_settings(read_metadata(file))
    return said


def heads_of(settings: Settings, *, download: bool = True) -> bool | None:
    """Return whether the indexers that settings name have retention heads.

    Args:
        settings (Settings): From :func:`resolve`.
        download (bool): Whether what is on the hub may be fetched. Default: ``True``.

    Returns:
        bool, optional: ``None`` if none are named, or they are not on this machine.

    Raises:
        ValueError: If the file is damaged.
    """
    name = settings.indexer
    if name is None:
        return None
    try:
        return has_heads(fetch(name, INDEXER_FILES, download=download))
    except FileNotFoundError:
        if download or not is_repository(name):
            raise
        return None


def resolve_auto_of(settings: Settings, *, download: bool = True) -> Settings:
    """Return settings with ``"stream"`` in place of an ``"auto"`` that takes it.

    Args:
        settings, download: As in :func:`heads_of`.
    """
    if not settings.config.auto_may_stream:
        return settings
    heads = heads_of(settings, download=download)
    return settings._replace(config=settings.config.resolved(bool(heads)))


def names_of(settings: Settings) -> dict[str, str]:
    """Say what settings load, in names that hold in any folder.

    Args:
        settings (Settings): From :func:`resolve`.

    Returns:
        dict: A ``preset``, or a ``model`` and its ``indexer``.
    """
    name = preset_of(settings.model)
    if name and resolve(name)[:2] == settings[:2]:
        return {"preset": name}
    named = {"model": settings.model, "indexer": settings.indexer}
    return {key: _anywhere(value) for key, value in named.items() if value}


def _anywhere(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def load_preset(name: str | None = "tiny", **overrides: Any) -> Preset:
    """Load a model, its tokenizer, its indexers and its config.

    Args:
        name (str, optional): A preset: ``"tiny"`` (bundled, works offline),
          ``"qwen2.5-coder-0.5b"``, ``"smollm2-135m"`` (their indexers are bundled),
          ``"qwen3-0.6b"``, ``"qwen3-4b"`` or ``"qwen3-8b"``; ``None`` for a model of
          your own, with its preset's settings if it has one.
          Default: ``"tiny"``.
        overrides: ``model`` and ``indexer`` (folders or hub repositories) and
          fields of :class:`SparseConfig`, over those of the preset.

    Returns:
        Preset: ``model``, ``tokenizer``, ``indexers`` and ``config``. The model
        is not patched yet.

    Raises:
        ValueError: If a setting is not valid, or something cannot be loaded.
    """
    return load_settings(resolve(name, **overrides))


def load_settings(settings: Settings) -> Preset:
    """Load what settings name: see :func:`load_preset`."""
    # The small part first: what is wrong with it shows before a long load.
    wanted = settings.config.wants_indexers or settings.indexer
    indexers = read_indexers(settings) if wanted else None
    model, tokenizer = load_model(settings.model)
    if indexers is None:
        indexers = dict.fromkeys(family_of(model).layers(model))
    return Preset(model, tokenizer, indexers, settings.config)


def read_indexers(settings: Settings) -> dict[int, Indexer] | dict[int, Projections] | dict[int, Calibration]:
    """Load the indexers that settings name, fetching them if they are on the hub.

    Args:
        settings (Settings): From :func:`resolve`.

    Returns:
        dict: Layer number to :class:`Indexer`, or what else the rule of selecting reads.

    Raises:
        ValueError: If none are named, or they cannot be loaded.
    """
    if settings.indexer is None:
        check_place(settings.model)  # a name that is mistyped has none either
        raise ValueError(
            f"[mlx-dsa] no indexers are known for {settings.model}. Name some "
            f"(--indexer PATH), train them (mlx-dsa train), choose rules that need none "
            f"(--select, --evict), or run it dense (--dense)."
        )
    path = fetch(settings.indexer, INDEXER_FILES)
    reads = make_rule("select", settings.config.select).reads
    if reads in CALIBRATED:
        return load_calibration(path, reads)
    return load_projections(path) if reads == PROJECTIONS else load_indexers(path)


def load_model(name: str) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer with mlx-lm, in a dtype fit for the device.

    Args:
        name (str): A folder or a hub repository.

    Returns:
        tuple: The model and its tokenizer.

    Raises:
        ValueError: If mlx-lm cannot load it.
    """
    folder = fetch(name)
    try:
        model, tokenizer, *_ = load(str(folder))
    except Exception as error:  # of a broken tokenizer.json: no other class
        reason = flawed_json(folder) or first_line(error)
        raise ValueError(f"[mlx-dsa] mlx-lm cannot load the model in {folder}: {reason}") from error
    if runs_float32():
        model.set_dtype(mx.float32)
    evaluate(model)
    return model, tokenizer
