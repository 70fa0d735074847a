"""mlx-dsa info: what would run, on what, and where its files are."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx.utils import tree_flatten

from .. import __version__, blas
from ..calibrated import Calibration
from ..crossovers import crossover_file, describe_args, describe_run, measured, plan_prefill
from ..hub import INDEXER_FILES, MODEL_FILES, fetch, is_repository, read_object
from ..machine import device_name, runs_float32
from ..ops import check_backend
from ..presets import Settings, preset_names, read_indexers, resolve_auto_of, resource
from ..saved import SavedSettings
from ..search import Projections
from ..versions import package_version
from .command import Command
from .options import dense_option, describe_config, model_options, open_saved, settings_from, sparse_options
from .session import hint_at_blas
from .tune import describe_crossovers, describe_measured

_STREAMS = "not needed: prefill auto is stream (positions compact, retention heads)"


@click.command(cls=Command)
@click.option("--cache-file", metavar="FILE", help="What mlx-dsa compress has written: of which text, and how.")
@model_options
@sparse_options
@dense_option
def info(dense: bool, cache_file: str | None, **given: Any) -> None:
    """Tell what a command would load and how it would run it.

    Nothing is fetched, and the model is not loaded.
    """
    saved = open_saved(cache_file, dense)
    settings = settings_from(dense=dense, saved=saved, **given)
    rows = [
        ("Versions", _versions()),
        ("Device", _device()),
        ("Model", _model(settings)),
        *([] if dense else _sparse_rows(settings)),
        *([("Cache", _saved(saved))] if saved else []),
        ("Presets", f"{', '.join(preset_names())} (in {resource('configs')})"),
    ]
    for name, text in rows:
        click.echo(f"{name:<10}{text}")
    hint_at_blas()


def _versions() -> str:
    packages = ", ".join(f"{p} {package_version(p)}" for p in ("mlx", "mlx-lm"))
    return f"mlx-dsa {__version__}, {packages}, Python {platform.python_version()}"


def _device() -> str:
    parts = list(dict.fromkeys([device_name(), str(mx.default_device())]))
    if runs_float32():
        parts.append("models run in float32")
    if blas.preload():
        parts.append("OpenBLAS loaded")
    return ", ".join(parts)


def _model(settings: Settings) -> str:
    folder = _on_this_machine(settings.model, MODEL_FILES)
    if folder is None:
        return f"{settings.model} (not on this machine; fetched when first used)"
    config = read_object(folder / "config.json")
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    facts = [
        str(config.get("model_type", "unknown type")),
        f"{config.get('num_hidden_layers', '?')} layers",
        f"hidden size {config.get('hidden_size', '?')}",
        f"{size / 1e6:,.1f} MB",
    ]
    return f"{folder} ({', '.join(facts)})"


def _sparse_rows(settings: Settings) -> list[tuple[str, str]]:
    check_backend(settings.config.backend)
    config = resolve_auto_of(settings, download=False).config
    streams = config.prefill == "stream" != settings.config.prefill
    return [
        ("Indexers", _indexers(settings)),
        ("Config", describe_config(config)),
        ("Backend", settings.config.backend),
        ("Tuned", _STREAMS if streams else _tuned(settings)),
    ]


def _saved(saved: SavedSettings) -> str:
    about = f" of {saved.metadata['file']}" if "file" in saved.metadata else ""
    size = saved.path.stat().st_size / 1e6
    return f"{saved.path} ({saved.tokens:,} tokens{about}, {size:,.1f} MB)"


def _tuned(settings: Settings) -> str:
    folder = _on_this_machine(settings.model, MODEL_FILES)
    if folder is None:
        return "unknown: the model is not on this machine"
    config = read_object(folder / "config.json")
    # The dtype is only known once the model is loaded.
    found = measured({**describe_args(config), **describe_run(settings.config)})
    if found is None:
        return "not yet: prefill auto follows a rule (see mlx-dsa tune)"
    plan = plan_prefill(found.crossovers, replace(settings.config, prefill="auto"))
    until = f", dense up to {plan.dense_until:,} keys" if plan.prefill != "dense" else ""
    used = "" if settings.config.prefill == "auto" else " (not used: prefill is set)"
    lines = "; ".join(describe_crossovers(found.crossovers, found.lengths))
    return f"prefill auto is {plan.prefill}{until}{used} ({lines}; {describe_measured(found)}, in {crossover_file()})"


def _indexers(settings: Settings) -> str:
    if settings.indexer is None:
        return "none known for this model: name some with --indexer, or train them"
    path = _on_this_machine(settings.indexer, INDEXER_FILES)
    if path is None:
        return f"{settings.indexer} (not on this machine; fetched when first used)"
    indexers = read_indexers(settings)
    one = next(iter(indexers.values()))
    count = sum(p.size for _, p in tree_flatten(one.parameters()))
    if isinstance(one, Projections):
        shape = f"search projections to {one.args.index_head_dim}"
        return f"{path} ({len(indexers)} layers, {shape}, {count:,} parameters a layer)"
    if isinstance(one, Calibration):
        return f"{path} ({len(indexers)} layers, calibrated on {one.model} for --select {one.kind})"
    shape = f"{one.args.index_n_heads} heads of {one.args.index_head_dim}"
    return (
        f"{path} ({len(indexers)} layers, {shape}, RoPE on {one.args.index_rope_dim}, "
        f"{count:,} parameters a layer, {_heads(indexers)})"
    )


def _heads(indexers: Mapping[int, Any]) -> str:
    without = sum(not indexer.has_retention for indexer in indexers.values())
    if not without:
        return "with retention heads"
    if without == len(indexers):
        return "without retention heads: train --retention adds them"
    return f"{without} without a retention head"


def _on_this_machine(name: str, patterns: tuple[str, ...]) -> Path | None:
    try:
        return fetch(name, patterns, download=False)
    except FileNotFoundError:
        if is_repository(name):
            return None
        raise
