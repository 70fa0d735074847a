"""What bench and tune run: a model that is loaded, or one of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
import mlx.nn as nn

from ..bench import BENCH_SHAPES, random_model
from ..config import SparseConfig
from ..indexer import Indexer
from ..ops import check_backend
from ..presets import Preset, load_settings
from .options import model_options, settings_from, sparse_options
from .session import hint_at_blas

_OPTIONS = (
    click.option(
        "--model-shape",
        type=click.Choice(list(BENCH_SHAPES)),
        help="In place of a model: random weights of this shape, with random indexers.",
    ),
    click.option(
        "--bits",
        type=click.Choice(["2", "3", "4", "6", "8", "16"]),
        help="With --model-shape: bits of a weight, 16 for none quantised.  [default: 4]",
    ),
    click.option(
        "--evict",
        type=click.Choice(["retention", "index", "window"]),
        help="What orders entries for eviction.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["auto", "reference", "metal", "cuda"]),
        help="Kernels to use.",
    ),
)
_NOT_WITH_A_SHAPE = ("preset", "model", "indexer", "config")


class Subject(NamedTuple):
    """What is measured.

    Args:
        name (str): As the user named it.
        model (nn.Module): The model, not patched.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How they run.
    """

    name: str
    model: nn.Module
    indexers: Mapping[int, Indexer]
    config: SparseConfig


def subject_options(command: Callable) -> Callable:
    """Add the options that name what is measured."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return model_options(sparse_options(command))


def open_subject(
    *, model_shape: str | None, bits: str | None, **given: Any
) -> Callable[[], Subject]:
    """Check the options, and return what loads or makes their model.

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
        settings = settings_from(**given)
        check_backend(settings.config.backend)

        def load() -> Subject:
            loaded: Preset = load_settings(settings)
            name = given["model"] or f"preset {given['preset'] or 'tiny'}"
            return Subject(name, loaded.model, loaded.indexers, settings.config)

        return load
    for name in _NOT_WITH_A_SHAPE:
        if given.pop(name) is not None:
            raise click.UsageError(f"--{name} and --model-shape exclude each other.")
    config = SparseConfig.from_dict({k: v for k, v in given.items() if v is not None})
    check_backend(config.backend)
    n_bits = int(bits or 4)

    def make() -> Subject:
        name = f"random {model_shape}, {n_bits} bits"
        return Subject(name, *random_model(model_shape, n_bits), config)

    return make
