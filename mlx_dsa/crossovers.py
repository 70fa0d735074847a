"""Where sparse attention begins to win on this machine, as ``mlx-dsa tune`` found it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .config import SparseConfig
from .files import replacing
from .indexer import Indexer
from .ops import crossover

_MODES = ("tile", "exact", "decode")


class PrefillPlan(NamedTuple):
    """How a prompt is read.

    Args:
        prefill (str): ``"tile"``, ``"exact"`` or ``"dense"``.
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


def describe(
    model: nn.Module, indexers: Mapping[int, Indexer], config: SparseConfig
) -> dict[str, Any]:
    """Return what a measurement holds for: shapes, settings, device and versions.

    Args:
        model (nn.Module): A Qwen3 or Qwen3-MoE model of mlx-lm, not patched.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How they run.

    Returns:
        dict: Names to strings and whole numbers.
    """
    layer = model.layers[next(iter(indexers))]
    # The evaluators' stand-ins for an indexer have no shape: nothing matches them.
    shape = getattr(next(iter(indexers.values())), "args", None)
    return {
        **describe_args(vars(model.args)),
        "dtype": str(layer.input_layernorm.weight.dtype).rpartition(".")[2],
        "bits": getattr(layer.self_attn.q_proj, "bits", None),
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
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "default_device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx-dsa": mlx_dsa.__version__,
    }


def lookup(description: Mapping[str, Any]) -> dict[str, int | None] | None:
    """Find what was measured for a description, or for a part of one.

    Args:
        description (Mapping): From :func:`describe`.

    Returns:
        dict, optional: ``"tile"``, ``"exact"`` and ``"decode"`` to the keys from which
        each is faster than dense attention, ``None`` for one that never was; ``None``
        if nothing was measured.
    """
    for entry in _read(crossover_file()):
        if description.items() <= entry["of"].items():
            return entry["from"]
    return None


def store(description: Mapping[str, Any], crossovers: Mapping[str, int | None]) -> Path:
    """Write what was measured, in place of what was known of the same.

    Args:
        description (Mapping): From :func:`describe`.
        crossovers (Mapping): As :func:`lookup` returns them.

    Returns:
        Path: The file, which is never left half written.
    """
    file = crossover_file()
    others = [e for e in _read(file) if e["of"] != description]
    entries = [{"of": dict(description), "from": dict(crossovers)}, *others]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return file


def plan_prefill(
    crossovers: Mapping[str, int | None] | None, config: SparseConfig
) -> PrefillPlan:
    """Choose how a prompt is read.

    Args:
        crossovers (Mapping, optional): From :func:`lookup`, for ``prefill="auto"``.
        config (SparseConfig): What is asked for, and what fits ``top_k``.

    Returns:
        PrefillPlan: As the config says. ``"auto"`` is tile where that wins, else
        exact, else dense at every length; without measurements it is tile where
        ``top_k`` has room for it, from :func:`crossover` on.
    """
    if config.prefill != "auto":
        return PrefillPlan(config.prefill, config.top_k)
    if crossovers is None:
        mode = "tile" if config.tile_fits else "exact"
        return PrefillPlan(mode, crossover(config.top_k))
    for mode in ("tile", "exact"):
        start = crossovers[mode]
        if start is not None and (mode == "exact" or config.tile_fits):
            return PrefillPlan(mode, max(start, config.top_k))
    return PrefillPlan("dense", config.top_k)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        entries = None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        warnings.warn(
            f"mlx-dsa: {file} cannot be read and is not used. Remove it, or run "
            f"mlx-dsa tune again.",
            stacklevel=4,
        )
        return []
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("of"), dict):
        return False
    start = entry.get("from")
    return isinstance(start, dict) and all(
        mode in start and (start[mode] is None or type(start[mode]) is int)
        for mode in _MODES
    )
