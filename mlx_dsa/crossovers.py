"""Where sparse attention begins to win on this machine, as ``mlx-dsa tune`` found it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .config import SparseConfig
from .families import family_of
from .files import replacing
from .machine import device_name
from .ops import crossover
from .versions import package_version

# What may be faster than dense from some length on.
CROSSING = ("tile", "exact", "decode")


class PrefillPlan(NamedTuple):
    """How a prompt is read.

    Args:
        prefill (str): ``"tile"``, ``"exact"``, ``"dense"`` or ``"stream"``.
        dense_until (int): Keys up to which a query attends to all that it sees.
    """

    prefill: str
    dense_until: int


def crossover_file() -> Path:
    """Return the file that holds what was measured; ``MLX_DSA_CACHE`` names its folder."""
    folder = os.environ.get("MLX_DSA_CACHE")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "mlx-dsa"
    return Path(folder) / "crossovers.json"


def describe(model: nn.Module, indexers: Mapping[int, Any], config: SparseConfig) -> dict[str, Any]:
    """Return what a measurement holds for: shapes, settings, device and versions.

    Args:
        model (nn.Module): A model of mlx-lm, not patched.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How they run.

    Returns:
        dict: Names to strings and whole numbers.
    """
    family = family_of(model)
    layer = family.layers(model)[next(iter(indexers))]
    # The evaluators' stand-ins for an indexer have no shape: nothing matches them.
    shape = getattr(next(iter(indexers.values())), "args", None)
    return {
        **describe_args(vars(family.args(model))),
        "dtype": str(layer.dtype).rpartition(".")[2],
        "bits": layer.bits,
        "index_n_heads": shape and shape.index_n_heads,
        "index_head_dim": shape and shape.index_head_dim,
        **describe_run(config),
    }


def describe_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a description that a model's ``config.json`` tells.

    Args:
        args (Mapping): Its keys and values.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim")
    return {name: args.get(name) for name in names}


def describe_run(config: SparseConfig) -> dict[str, Any]:
    """Return the part of a description that does not depend on the model.

    Args:
        config (SparseConfig): How a model is patched.
    """
    import mlx_dsa  # here: the package imports this module

    return {
        "top_k": config.top_k,
        "tile_size": config.tile_size,
        "backend": config.backend,
        "device": device_name(),
        "default_device": str(mx.default_device()),
        "mlx": package_version("mlx"),
        "mlx-dsa": mlx_dsa.__version__,
    }


class Measured(NamedTuple):
    """What ``mlx-dsa tune`` has stored.

    Args:
        crossovers (dict): ``"tile"``, ``"exact"`` and ``"decode"``, where they were
          compared, to the keys from which each is faster than dense attention; ``None``
          for one that never was.
        lengths (tuple of int): Keys at which they were compared, ascending.
        when (str): The day and the time.
        of (dict): The description that it holds for.
    """

    crossovers: dict[str, int | None]
    lengths: tuple[int, ...]
    when: str
    of: dict[str, Any]


def measured(description: Mapping[str, Any]) -> Measured | None:
    """Find what was measured for a description, or for a part of one.

    Args:
        description (Mapping): From :func:`describe`.

    Returns:
        Measured, optional: ``None`` if nothing was.
    """
    for entry in _read(crossover_file()):
        if description.items() <= entry["of"].items():
            return Measured(entry["from"], tuple(entry["lengths"]), entry["when"], entry["of"])
    return None


def lookup(description: Mapping[str, Any]) -> dict[str, int | None] | None:
    """Return the crossovers of :func:`measured`, or ``None``."""
    found = measured(description)
    return found and found.crossovers


def store(
    description: Mapping[str, Any],
    crossovers: Mapping[str, int | None],
    lengths: Sequence[int] = (),
) -> Path:
    """Write what was measured, in place of what was known of the same.

    Args:
        description (Mapping): From :func:`describe`.
        crossovers (Mapping): As :func:`lookup` returns them.
        lengths (sequence of int): Keys at which they were compared, ascending.
          Default: ``()``, not known.

    Returns:
        Path: The file, which is never left half written.
    """
    entry = {
        "of": dict(description),
        "from": dict(crossovers),
        "lengths": list(lengths),
        "when": datetime.now().isoformat(" ", "minutes"),
    }
    others = [e for e in _read(crossover_file()) if e["of"] != description]
    return _write([entry, *others])


def forget(description: Mapping[str, Any] | None = None) -> bool:
    """Remove what was measured for a description, or everything, a damaged file too.

    Args:
        description (Mapping, optional): From :func:`describe`. Default: ``None``, all.

    Returns:
        bool: Whether there was something to remove.
    """
    file = crossover_file()
    if description is None:
        found = file.exists()
        file.unlink(missing_ok=True)
        return found
    entries = _read(file)
    others = [e for e in entries if e["of"] != description]
    if len(others) < len(entries):
        _write(others)
    return len(others) < len(entries)


def resolve_auto(config: SparseConfig, indexers: Mapping[int, Any]) -> SparseConfig:
    """Return a config with ``"stream"`` in place of an ``"auto"`` that takes it, and with
    ``"dense"`` where heads keep entries of their own, among which no rule selects.

    Args:
        config (SparseConfig): What is asked for.
        indexers (Mapping): Layer number to :class:`Indexer`.
    """
    if config.prefill == "auto" and config.evicts_by_head:
        return replace(config, prefill="dense")
    if not config.auto_may_stream:
        return config
    sparse = [x for i, x in indexers.items() if i not in config.dense_layers]
    return config.resolved(bool(sparse) and all(x.has_retention for x in sparse))


def plan_prefill(crossovers: Mapping[str, int | None] | None, config: SparseConfig) -> PrefillPlan:
    """Choose how a prompt is read.

    Args:
        crossovers (Mapping, optional): From :func:`lookup`, for ``prefill="auto"``.
        config (SparseConfig): What is asked for, from :func:`resolve_auto`, and what fits
          ``top_k``.

    Returns:
        PrefillPlan: As the config says. ``"auto"`` is tile where that wins, else
        exact. Where neither does it is dense at every length, unless the one that
        ``top_k`` has room for, tile before exact, was not measured: then it is that
        one, from :func:`crossover` on.
    """
    if config.prefill != "auto":
        return PrefillPlan(config.prefill, config.top_k)
    found = crossovers or {}
    for mode in ("tile", "exact"):
        start = found.get(mode)
        if start is not None and (mode == "exact" or config.tile_fits):
            return PrefillPlan(mode, max(start, config.top_k))
    mode = "tile" if config.tile_fits else "exact"
    if mode not in found:
        return PrefillPlan(mode, crossover(config.top_k))
    return PrefillPlan("dense", config.top_k)


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the entries that say when and at which lengths they were measured."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        entries = None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        warnings.warn(
            f"mlx-dsa: {file} cannot be read and is not used. Remove it (mlx-dsa tune "
            f"--reset --all), or run mlx-dsa tune again.",
            stacklevel=4,
        )
        return []
    # Older ones took what was never measured for slower.
    return [entry for entry in entries if "when" in entry]


def _write(entries: list[dict[str, Any]]) -> Path:
    file = crossover_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return file


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("of"), dict):
        return False
    start, lengths = entry.get("from"), entry.get("lengths", [])
    return (
        isinstance(start, dict)
        and all(way in CROSSING and _is_keys(n) for way, n in start.items())
        and isinstance(lengths, list)
        and all(type(n) is int for n in lengths)
        and ("when" not in entry or isinstance(entry["when"], str) and "lengths" in entry)
    )


def _is_keys(value: Any) -> bool:
    return value is None or type(value) is int
