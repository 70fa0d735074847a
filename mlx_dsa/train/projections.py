"""Training of search projections: InfoNCE towards the teacher's best keys, and a KL divergence.

unixsysdev, Make Attention Sub-Quadratic Again: Learned Search Projections for Attention Candidate
Retrieval (ann-sparseattention), 2026. Deviations: sampled query rows in place of all; keys that
the runtime selects anyway are left out of both losses, and a row's divergence counts by the
attention that is left (with n_sink and n_recent 0 both are the paper's); each layer keeps its
best step.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..families import family_of
from ..search import Projections, ProjectionsArgs, save_projections
from .config import LayerScore, RunConfig, TrainProgress, TrainResult
from .loop import IndexerRun, of_best, prepare_run, split
from .loss import distillation_loss, layer_score, open_keys
from .state import CHECKPOINT, TrainState
from .teacher import LayerView, attention_target, visible_keys

_UNSEEN = -1e30
_INIT = 0.02  # standard deviation of new matrices


@dataclass(frozen=True)
class ProjectionsConfig(RunConfig):
    """Describe a run that trains search projections.

    Args:
        steps, sequence_length, ..., seed: As in :class:`RunConfig`.
        top_k, n_sink, n_recent, query_rows, focus_share: As in :class:`TrainConfig`.
        search_dim (int): Width of a search vector. Default: ``128``.
        positives (int): Keys with the most attention, which a query is drawn to.
          Default: ``16``.
        temperature (float): Of the cosines in InfoNCE. Default: ``0.07``.
        kl_weight (float): Weight of the divergence beside InfoNCE. Default: ``1.0``.

    Raises:
        ValueError: If a value is of the wrong type or out of range.
    """

    top_k: int = 2048
    n_sink: int = 4
    n_recent: int = 32
    query_rows: int = 512
    focus_share: float = 0.5
    search_dim: int = 128
    positives: int = 16
    temperature: float = 0.07
    kl_weight: float = 1.0

    support_weight: ClassVar[float] = 0.0  # what the shared loss asks for
    _WHOLE = {
        **RunConfig._WHOLE,
        "top_k": 1,
        "n_sink": 0,
        "n_recent": 0,
        "query_rows": 1,
        "search_dim": 1,
        "positives": 1,
    }
    _REAL = (*RunConfig._REAL, "temperature", "kl_weight")
    _POSITIVE = (*RunConfig._POSITIVE, "temperature")
    _SHARES = ("focus_share",)

    def __post_init__(self):
        super().__post_init__()
        least = self.n_sink + self.n_recent + self.positives
        if self.top_k < least:
            raise ValueError(
                f"[ProjectionsConfig] 'top_k' must be at least n_sink + n_recent + positives = "
                f"{least} but got {self.top_k}. Raise top_k, or lower one of these."
            )
        if self.sequence_length <= self.top_k:
            raise ValueError(
                f"[ProjectionsConfig] 'sequence_length' must exceed top_k = {self.top_k} but "
                f"got {self.sequence_length}. Use longer sequences, or a smaller top_k."
            )


def train_projections(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: ProjectionsConfig,
    *,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train search projections of every layer beside a frozen model.

    Args:
        model, tokenizer, data, out, resume, progress: As in :func:`train_indexers`.
        config (ProjectionsConfig): The run.

    Returns:
        TrainResult: The file, and each layer's best step with its scores.

    Raises:
        ValueError: As there.
    """
    out = Path(out)
    sequences, identity, report = prepare_run(model, tokenizer, data, config, out, resume)
    state = TrainState(new_projections(model, config), config, LayerScore)
    run = ProjectionsRun(model, config, state, *split(sequences, config))
    run.finish(out, identity, resume, progress)
    metadata = {
        "model_type": model.model_type,
        "num_hidden_layers": len(model.layers),
        "train": dataclasses.asdict(config),
        "held_out": of_best(state),
    }
    path = save_projections(out, state.best_modules(), metadata)
    (out / CHECKPOINT).unlink()
    return TrainResult(path, dict(state.best_steps), dict(state.best_scores), str(report))


def new_projections(model: Any, config: ProjectionsConfig) -> dict[int, Projections]:
    """Make the projections of all layers; the seed alone decides their weights."""
    layers = family_of(model).layers(model)
    args = ProjectionsArgs(next(iter(layers.values())).hidden_size, config.search_dim)
    mx.random.seed(config.seed)
    made = {}
    for i in layers:
        made[i] = projections = Projections(args)
        for linear in (projections.wq, projections.wk):
            linear.weight = mx.random.normal(linear.weight.shape) * _INIT
    return made


class ProjectionsRun(IndexerRun):
    """Search projections learn the attention of sampled query rows."""

    def target(self, view: LayerView, prepared: mx.array) -> mx.array:
        """Return the largest attention over heads of the query rows, normalised to 1."""
        largest = attention_target(view, prepared, mx.max)
        return largest / largest.sum(axis=-1, keepdims=True)

    def loss(self, module: Any, view: LayerView, prepared: mx.array, target: mx.array) -> mx.array:
        """Return the sum of both losses of one layer's projections."""
        products, cosines = row_products(module, view.x, prepared)
        is_open = open_keys(prepared, view.x.shape[1], self.config)
        return search_loss(products, cosines, target, is_open, self.config)

    def score(self, module: Any, view: LayerView, prepared: mx.array) -> LayerScore:
        """Return the held-out score of one layer's projections."""
        _, cosines = row_products(module, view.x, prepared)
        is_open = open_keys(prepared, view.x.shape[1], self.config)
        scores = mx.where(visible_keys(prepared, view.x.shape[1]), cosines, _UNSEEN)
        score = layer_score(scores, attention_target(view, prepared), is_open, self.config)
        loss = self.loss(module, view, prepared, self.target(view, prepared))
        return score._replace(loss=float(loss))


def row_products(module: Projections, x: mx.array, rows: mx.array) -> tuple[mx.array, mx.array]:
    """Compare sampled query rows with all keys.

    Args:
        module (Projections): In float32.
        x (mx.array): Normalised hidden state ``[B, L, dim]``.
        rows (mx.array): Query positions ``[B, R]``.

    Returns:
        tuple: Products of the vectors, by the root of their width, and cosines, each
        ``[B, R, L]``.
    """
    keys = module.wk(x)
    queries = module.wq(mx.take_along_axis(x, rows[..., None], axis=1))
    products = queries @ keys.swapaxes(-1, -2)
    lengths = [mx.rsqrt(mx.maximum((a * a).sum(axis=-1), 1e-24)) for a in (queries, keys)]
    cosines = products * lengths[0][..., None] * lengths[1][:, None]
    return products * keys.shape[-1] ** -0.5, cosines


def search_loss(
    products: mx.array,
    cosines: mx.array,
    target: mx.array,
    is_open: mx.array,
    config: ProjectionsConfig,
) -> mx.array:
    """Compute InfoNCE of the cosines and the divergence of the products.

    Args:
        products, cosines (mx.array): Of :func:`row_products`, ``[B, R, L]``.
        target (mx.array): Teacher's probabilities ``[B, R, L]``.
        is_open (mx.array): Mask ``[B, R, L]`` of keys to choose among.
        config (ProjectionsConfig): The run.

    Returns:
        mx.array: Mean over rows, a scalar in nats.
    """
    logits = mx.where(is_open, cosines / config.temperature, _UNSEEN)
    paid = mx.where(is_open, target, 0)
    least = mx.topk(paid, config.positives, axis=-1).min(axis=-1, keepdims=True)
    positive = (paid >= least) & (paid > 0)
    total = mx.logsumexp(logits, axis=-1)
    drawn = mx.logsumexp(mx.where(positive, logits, _UNSEEN), axis=-1)
    contrast = mx.where(positive.any(axis=-1), total - drawn, 0).mean()
    return contrast + config.kl_weight * distillation_loss(products, target, is_open, config)
