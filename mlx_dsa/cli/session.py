"""Load what a command runs: a model, patched or dense, and its sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import blas
from ..machine import on_cpu
from ..patch import SparsePatch, patch_sparse_generate
from ..presets import Settings, load_model, load_settings


class Session(NamedTuple):
    """What a command runs; no patch where the model is dense."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    sampler: Callable[[mx.array], mx.array]
    patch: SparsePatch | None = None

    @property
    def sparse(self) -> SparsePatch:
        """The patch, where the model is not dense."""
        assert self.patch is not None
        return self.patch


@contextmanager
def open_session(settings: Settings, *, dense: bool, temp: float, seed: int) -> Iterator[Session]:
    """Load a model and patch it until the context ends.

    Args:
        settings (Settings): From :func:`settings_from`.
        dense (bool): Leave the model as it is.
        temp (float): Sampling temperature.
        seed (int): Seed of the sampling.

    Yields:
        Session: The model and what goes with it.
    """
    hint_at_blas()
    mx.random.seed(seed)
    sampler = make_sampler(temp)
    if dense:
        yield Session(*load_model(settings.model), sampler)
        return
    model, tokenizer, indexers, config = load_settings(settings)
    with patch_sparse_generate(model, indexers, **vars(config)) as patch:
        yield Session(model, tokenizer, sampler, patch)


def hint_at_blas() -> None:
    """Tell a user on the CPU of a Linux machine what would make it fast."""
    slow = sys.platform.startswith("linux") and not blas.preload()
    if slow and on_cpu():
        click.echo(f"Note: {blas.HINT}", err=True)
