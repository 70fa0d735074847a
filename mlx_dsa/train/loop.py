"""The training run: steps, evaluation, checkpoints, and the best step of each layer."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..checkpoint import save_indexers
from ..families import family_of
from ..indexer import Indexer, IndexerArgs
from .config import LayerScore, TrainConfig, TrainProgress, TrainResult
from .data import Sequence, fingerprint, load_sequences, pad_batch, sample_rows
from .loss import distillation_loss, layer_score, open_keys, row_scores
from .report import Report
from .state import CHECKPOINT, TrainState, check_out, run_identity
from .teacher import LayerView, attention_target, check_model, layer_views

# Streams of random numbers, each a function of seed and step: a resumed run draws the same.
_SPLIT, _ORDER, _TRAIN, _HELD_OUT = range(4)


def train_indexers(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Distil one indexer a layer onto a frozen model.

    Each layer's indexer learns the layer's own attention: the target is the sum
    over heads of the dense attention probabilities, normalised to 1, and the
    loss is ``KL(target || softmax(index scores))`` over the visible keys [1] but
    those that the runtime selects anyway.

    Args:
        model: A model of mlx-lm, of a known family, quantised or not,
          unpatched. It is not changed.
        tokenizer: Its tokenizer, as ``mlx_lm.load`` returns it.
        data (str or PathLike): A ``.txt``, ``.jsonl`` or ``.jsonl.gz`` file, or
          else a dataset's name on the hub or its local folder. A row has
          ``"text"``, or a chat as ``"messages"`` (and ``"tools"``) or as
          ``"prompt"`` and ``"completion"``. A chat becomes what the tokenizer's
          template renders. Other rows are left out, counted, and warned of.
        out (str or PathLike): The folder for the checkpoint, and at the end for
          ``indexers.safetensors`` with its ``run_config.json``. It must be new
          or empty, unless ``resume`` is set.
        config (TrainConfig): The run.
        resume (bool): Go on from the checkpoint in ``out``, which must be of
          this same run; where there is none yet, begin. Default: ``False``.
        progress (callable, optional): Called with a :class:`TrainProgress`
          after every step.

    Returns:
        TrainResult: The file, and each layer's best step with its scores.

    Raises:
        ValueError: If the model is of another type or patched, the data is
          missing or too short, or ``out`` holds another or a finished run.

    [1] DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with
        DeepSeek Sparse Attention, 2025.
    """
    out = Path(out)
    sequences, identity, report = prepare_run(model, tokenizer, data, config, out, resume)
    state = TrainState(new_indexers(model, config), config, LayerScore)
    run = IndexerRun(model, config, state, *split(sequences, config))
    run.finish(out, identity, resume, progress)
    told = {"held_out": of_best(state)}
    return assemble(out, model, config, state, told)._replace(left_out=str(report))


def prepare_run(model, tokenizer, data, config, out: Path, resume: bool):
    """Check what a run is given, and load its rows.

    Args:
        model, tokenizer, data, resume: As in :func:`train_indexers`.
        config: The run, of selections.
        out (Path): Its folder.

    Returns:
        tuple: The sequences, what tells the run from others, and the report of rows left out.

    Raises:
        ValueError: As in :func:`train_indexers`.
    """
    check_model(model)
    check_out(out, resume)
    wanted = config.steps * config.batch_size + config.held_out
    report = Report()
    sequences = load_sequences(data, tokenizer, config.sequence_length, config.top_k, wanted, report=report)
    return sequences, run_identity(model, fingerprint(sequences), config), report


class TrainRun:
    """One process's part of a run: steps, evaluations and checkpoints.

    What is learnt is up to :meth:`prepare`, :meth:`target`, :meth:`loss` and :meth:`score`.

    Args:
        model: The frozen model.
        config: The run: a :class:`TrainConfig` or :class:`RetentionConfig`.
        state (TrainState): Where it stands.
        train, held_out (list): Sequences, each with ``tokens``.
    """

    def __init__(self, model: Any, config: Any, state: TrainState, train: list, held_out: list):
        self.model, self.config, self.state = model, config, state
        self.train, self.held_out = train, held_out
        self.began = time.perf_counter()

    def prepare(self, batch: list, stream: int, number: int) -> Any:
        """Return what the layers share of a batch, given a stream of chance."""
        raise NotImplementedError

    def target(self, view: LayerView, prepared: Any) -> Any:
        """Return what the modules of one layer are to learn."""
        raise NotImplementedError

    def loss(self, module: Any, view: LayerView, prepared: Any, target: Any) -> mx.array:
        """Return the loss of one layer's module, a scalar."""
        raise NotImplementedError

    def learn(self, module: nn.Module, view: LayerView, prepared: Any) -> tuple:
        """Return loss and gradient of one layer's module."""
        target = self.target(view, prepared)
        value_and_grad = nn.value_and_grad(module, lambda: self.loss(module, view, prepared, target))
        return value_and_grad()

    def clip(self, gradient: dict) -> dict:
        """Scale the gradient of one layer's module down to the norm that it may have."""
        return optim.clip_grad_norm(gradient, self.config.max_grad_norm)[0]

    def score(self, module: Any, view: LayerView, prepared: Any) -> tuple:
        """Return the held-out score of one layer's module."""
        raise NotImplementedError

    def finish(self, out: Path, identity: dict, resume: bool, progress: Callable | None):
        """Take all steps, or those that the checkpoint in ``out`` leaves."""
        config, state = self.config, self.state
        if resume and (out / CHECKPOINT).exists():
            state.load(out, identity)
        else:
            state.save(out, identity)
        self.report(progress, None)
        while state.step < config.steps:
            loss = self.take_step()
            try:
                self.report(progress, loss)
            except KeyboardInterrupt:
                state.save(out, identity)  # a step is whole here: nothing of it is lost
                raise
            if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                state.save(out, identity)

    def take_step(self) -> float:
        """Train every layer on one batch; return the mean loss of the layers."""
        config, state = self.config, self.state
        batch = _batch(self.train, state.step, config)
        prepared = self.prepare(batch, _TRAIN, state.step)
        gradients, losses = [], []
        for module, view in self.views(batch):
            loss, gradient = self.learn(module, view, prepared)
            gradient = self.clip(gradient)
            mx.eval(loss, gradient)
            gradients.append(gradient)
            losses.append(loss)
        state.apply_gradients(gradients, _learning_rate(state.step, config))
        state.step += 1
        state.tokens += sum(len(s.tokens) for s in batch)
        loss = float(mx.stack(losses).mean())
        if not math.isfinite(loss):
            raise ValueError(
                f"[train] the loss of step {state.step} is {loss}. Begin again with a lower 'learning_rate'."
            )
        return loss

    def report(self, progress: Callable | None, loss: float | None):
        """Evaluate where it is time, and tell the caller."""
        config, state = self.config, self.state
        due = state.step % config.eval_every == 0 or state.step == config.steps
        scores = self.evaluate() if due else None
        if scores:
            state.keep_best(scores)
        if progress is not None:
            progress(
                TrainProgress(
                    state.step,
                    config.steps,
                    loss,
                    _learning_rate(max(0, state.step - 1), config),
                    state.tokens,
                    time.perf_counter() - self.began,
                    scores,
                )
            )

    def evaluate(self) -> dict[int, Any]:
        """Score every layer on the held-out sequences, one sequence at a time."""
        scores = []
        for number, sequence in enumerate(self.held_out):
            prepared = self.prepare([sequence], _HELD_OUT, number)
            views = self.views([sequence])
            scores.append([self.score(module, view, prepared) for module, view in views])
        return {
            layer: self.state.score_type(*(sum(v) / len(v) for v in zip(*of_layer)))
            for layer, of_layer in zip(self.state.modules, zip(*scores))
        }

    def views(self, batch: list) -> Iterator[tuple[nn.Module, LayerView]]:
        """Run the model over a batch; yield the modules with what they learn from."""
        modules = self.state.modules
        tokens = mx.array(pad_batch(batch))
        views = layer_views(self.model, tokens, self.config.chunk_size)
        for layer, view in views:
            if layer in modules:
                yield modules[layer], view


class IndexerRun(TrainRun):
    """Indexers learn the attention of sampled query rows."""

    def prepare(self, batch: list[Sequence], stream: int, number: int) -> mx.array:
        """Draw the query rows ``[B, R]``."""
        config = self.config
        rng = np.random.default_rng([config.seed, stream, number])
        rows = [sample_rows(s, config.query_rows, config.top_k, config.focus_share, rng) for s in batch]
        return mx.array(np.stack(rows))

    def target(self, view: LayerView, prepared: mx.array) -> mx.array:
        """Return the attention of the query rows."""
        return attention_target(view, prepared)

    def loss(self, module: Indexer, view: LayerView, prepared: mx.array, target: mx.array) -> mx.array:
        """Return the divergence of one layer's indexer from its attention."""
        scores = row_scores(module, view.x, prepared)
        is_open = open_keys(prepared, view.x.shape[1], self.config)
        return distillation_loss(scores, target, is_open, self.config)

    def score(self, module: Indexer, view: LayerView, prepared: mx.array) -> LayerScore:
        """Return the held-out score of one layer's indexer."""
        scores = row_scores(module, view.x, prepared)
        target = self.target(view, prepared)
        is_open = open_keys(prepared, view.x.shape[1], self.config)
        return layer_score(scores, target, is_open, self.config)


def new_indexers(model: Any, config: TrainConfig) -> dict[int, Indexer]:
    """Make the indexers of all layers; the seed alone decides their weights."""
    layers = family_of(model).layers(model)
    args = IndexerArgs(
        dim=next(iter(layers.values())).hidden_size,
        index_n_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_rope_dim=config.index_rope_dim,
    )
    mx.random.seed(config.seed)
    return {i: Indexer(args).bind(layer, mx.float32, fused=False) for i, layer in layers.items()}


def split(sequences: list, config: Any) -> tuple[list, list]:
    """Divide sequences by chance into those to train on and those held out."""
    if len(sequences) <= config.held_out:
        raise ValueError(
            f"[train] 'data' must give more than held_out = {config.held_out} "
            f"sequences but gives {len(sequences)} of up to {config.sequence_length} "
            f"tokens. Give more text, or a smaller held_out."
        )
    order = np.random.default_rng([config.seed, _SPLIT]).permutation(len(sequences))
    chosen = [sequences[i] for i in order]
    return chosen[config.held_out :], chosen[: config.held_out]


def _batch(train: list, step: int, config: Any) -> list:
    """Return the batch of a step; every pass over the data has its own order."""
    batch = []
    for number in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(number, len(train))
        rng = np.random.default_rng([config.seed, _ORDER, epoch])
        batch.append(train[rng.permutation(len(train))[place]])
    return batch


def _learning_rate(step: int, config: Any) -> float:
    """Return the rate of the step after ``step``: linear warm-up, then a cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def of_best(state: TrainState) -> dict[int, dict[str, Any]]:
    """Return each layer's best step and its scores, for ``run_config.json``."""
    return {
        layer: {"best_step": state.best_steps[layer], **score._asdict()} for layer, score in state.best_scores.items()
    }


def assemble(out: Path, model: Any, config: TrainConfig, state: TrainState, told: dict) -> TrainResult:
    """Save each layer's best step as one file, with what is ``told`` of it in its
    ``run_config.json``; only then does the checkpoint go."""
    metadata = {
        "model_type": model.model_type,
        "num_hidden_layers": len(model.layers),
        "train": dataclasses.asdict(config),
        **told,
    }
    of_model = family_of(model).layers(model)
    best = {i: module.unweighted(of_model[i]) for i, module in state.best_modules().items()}
    path = save_indexers(out, best, metadata)
    (out / CHECKPOINT).unlink()
    return TrainResult(path, dict(state.best_steps), dict(state.best_scores))
