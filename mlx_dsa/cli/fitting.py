"""Which settings fit indexers that were trained here."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from ..config import SparseConfig
from ..train import ProjectionsConfig, RetentionConfig, TrainConfig
from .options import settings_from


def fitting_chat(
    named: dict[str, str | None],
    path: Path,
    settings: TrainConfig | RetentionConfig | ProjectionsConfig,
) -> list[str]:
    """Tell how to chat with indexers so that no less is selected than they were trained for.

    Args:
        named (dict): ``preset`` and ``model``, as the user named them.
        path (Path): The indexers.
        settings (TrainConfig, RetentionConfig or ProjectionsConfig): How they, or the
          heads beside them, were trained.

    Returns:
        list of str: The command, and what no option of it can say.
    """
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    trained, config = _trained_for(settings, path), settings_from(**given).config
    options = {**given, "indexer": str(path), **_changes(config, trained)}
    if isinstance(settings, ProjectionsConfig):
        options["select"] = "projections"
    words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    lines = [f"Try: {shlex.join(['mlx-dsa', 'chat', *chain(*words)])}"]
    if trained.get("n_sink", 0) > config.n_sink:
        lines.append(f'with {{"n_sink": {trained["n_sink"]}}} in a --config file.')
    return lines


def _trained_for(settings: Any, path: Path) -> dict[str, int]:
    if isinstance(settings, TrainConfig | ProjectionsConfig):
        return asdict(settings)
    # The indexers beside the heads may be another's, who says nothing of it.
    run = json.loads(path.with_name("run_config.json").read_text(encoding="utf-8"))
    known = run.get("train", {})
    # Queries so near to a key did not count for its head.
    return {**known, "n_recent": max(known.get("n_recent", 1), settings.min_distance)}


def _changes(config: SparseConfig, trained: dict[str, int]) -> dict[str, int]:
    """Return the top_k, and an n_recent where the usual one is too small or too large."""
    n_sink = max(config.n_sink, trained.get("n_sink", 0))
    n_recent = max(1, trained["n_recent"])
    top_k = max(trained.get("top_k", config.top_k), n_sink + n_recent)
    usual = min(config.n_recent, top_k // 2)
    fits = n_recent <= usual <= top_k - n_sink
    return {"top_k": top_k, **({} if fits else {"n_recent": n_recent})}
