"""What bench and tune run: a model that is loaded, or one of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
import mlx.nn as nn

from ..bench import BENCH_SHAPES, BenchShape, random_model
from ..config import CHOICES, SparseConfig
from ..indexer import Indexer
from ..ops import check_backend
from ..presets import load_model, load_settings, preset_names, resolve
from .options import add_options, model_options, settings_from, sparse_options, subject_name
from .session import hint_at_blas

_OPTIONS = (
    click.option(
        "--model-shape",
        type=click.Choice(list(BENCH_SHAPES)),
        help="In place of a model: random weights of this shape, with random indexers "
        "and the settings of the preset of that name, if there is one.",
    ),
    click.option(
        "--bits",
        type=click.Choice(["2", "3", "4", "6", "8", "16"]),
        help="With --model-shape: bits of a weight, 16 for none quantised.  [default: 4]",
    ),
    click.option(
        "--backend",
        type=click.Choice(CHOICES["backend"]),
        help="Kernels to use.",
    ),
)
chunk_option = click.option(
    "--chunk",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of the prompt that are read at once.",
)
_NOT_WITH_A_SHAPE = ("preset", "model", "indexer", "config")


class Subject(NamedTuple):
    """What is measured.

    Args:
        name (str): As the user named it.
        config (SparseConfig): How it runs.
        load (callable): Returns the model, not patched, and its indexers.
        load_model (callable): Returns the model alone, which may have no indexers.
        shape (BenchShape, optional): Of random weights.
    """

    name: str
    config: SparseConfig
    load: Callable[[], tuple[nn.Module, Mapping[int, Indexer]]]
    load_model: Callable[[], nn.Module]
    shape: BenchShape | None = None


def subject_options(command: Callable) -> Callable:
    """Add the options that name what is measured."""
    return model_options(sparse_options(add_options(command, _OPTIONS)))


def open_subject(*, model_shape: str | None, bits: str | None, **given: Any) -> Subject:
    """Check the options; nothing is loaded yet.

    Args:
        model_shape (str, optional): ``--model-shape``.
        bits (str, optional): ``--bits``.
        given: The other options by name, ``None`` where not given.

    Raises:
        click.UsageError: If options exclude each other.
        ValueError: If a value is not valid.
    """
    hint_at_blas()
    if model_shape is None:
        if bits is not None:
            raise click.UsageError("--bits needs --model-shape.")
        return _named(given)
    for name in _NOT_WITH_A_SHAPE:
        if given.pop(name) is not None:
            raise click.UsageError(f"--{name} and --model-shape exclude each other.")
    overrides = {k: v for k, v in given.items() if v is not None}
    preset = model_shape if model_shape in preset_names() else None
    config = resolve(preset, **overrides, model=model_shape).config
    check_backend(config.backend)
    n_bits = int(bits or 4)
    return Subject(
        f"random {model_shape}, {n_bits} bits",
        config,
        lambda: random_model(model_shape, n_bits),
        lambda: random_model(model_shape, n_bits)[0],
        BENCH_SHAPES[model_shape],
    )


def _named(given: dict[str, Any]) -> Subject:
    settings = settings_from(**given)
    name = subject_name(settings, given["preset"], given["model"], given["config"])
    check_backend(settings.config.backend)

    def load() -> tuple[nn.Module, Mapping[int, Indexer]]:
        preset = load_settings(settings)
        return preset.model, preset.indexers

    return Subject(name, settings.config, load, lambda: load_model(settings.model)[0])
