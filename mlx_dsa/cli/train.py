"""mlx-dsa train: distil indexers onto a model, or add retention heads to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..hub import INDEXER_FILES, fetch
from ..presets import load_model
from ..train import (
    ProjectionsConfig,
    RetentionConfig,
    TrainConfig,
    TrainResult,
    train_indexers,
    train_projections,
    train_retention,
    train_together,
)
from ..train.state import CHECKPOINT, FINISHED, check_out
from .command import Command
from .fitting import fitting_chat
from .options import SEED, settings_from
from .runs import run_options
from .session import hint_at_blas
from .training import Display, describe, worst_layer

HELP = {
    "steps": "Optimizer steps.",
    "sequence_length": "Tokens of a sequence; more than top-k.",
    "batch_size": "Sequences a step.",
    "learning_rate": "Peak learning rate.",
    "warmup_steps": "Steps of linear warm-up.",
    "weight_decay": "Weight decay of AdamW.",
    "max_grad_norm": "Largest gradient norm of a layer.",
    "held_out": "Sequences kept for evaluation.",
    "eval_every": "Steps between evaluations.",
    "checkpoint_every": "Steps between checkpoints.",
    "chunk_size": "Tokens a chunk of the teacher's pass.",
    "seed": "Seed of weights, order and rows.",
    "top_k": "Keys of recall@K, mass@K and the support loss.",
    "n_sink": "First tokens left out of the loss: always selected.",
    "n_recent": "Newest tokens, likewise.",
    "index_n_heads": "Heads of an indexer.",
    "index_head_dim": "Width of an index head.",
    "index_rope_dim": "Leading dims of a head that RoPE rotates.",
    "query_rows": "Queries a sequence and step that are compared.",
    "focus_share": "Share of these from replies and their questions.",
    "support_weight": "Weight of the support loss.",
}
RETENTION_HELP = {
    "retention_dim": "Width of a head's hidden layer.",
    "repeat_share": "Share of the sequences that are read twice.",
    "min_distance": "Tokens after a key whose queries don't count.",
}
PROJECTIONS_HELP = {
    "search_dim": "Width of a search vector.",
    "positives": "Keys with the most attention, to which a query is drawn.",
    "temperature": "Of the cosines in InfoNCE.",
    "kl_weight": "Weight of the divergence beside InfoNCE.",
}


def _training_options(command: Callable) -> Callable:
    kinds = (ProjectionsConfig, TrainConfig, RetentionConfig)
    options = {field.name: field for kind in kinds for field in fields(kind)}
    help_ = {**HELP, **{k: f"Heads: {v}" for k, v in RETENTION_HELP.items()}}
    help_ |= {k: f"Projections: {v}" for k, v in PROJECTIONS_HELP.items()}
    for name in reversed(help_):
        default = options[name].default
        text = f"{help_[name]}  [default: {default}]"
        option = "--" + name.replace("_", "-")
        kind = SEED if name == "seed" else type(default)
        command = click.option(option, type=kind, help=text)(command)
    return command


@click.command(cls=Command)
@run_options
@click.option(
    "--rule",
    type=click.Choice(["lightning", "projections"]),
    default="lightning",
    show_default=True,
    help="Which rule of selecting (--select) to train for.",
)
@click.option("--both", is_flag=True, help="Train retention heads with the indexers, in one run.")
@click.option("--retention", is_flag=True, help="Add retention heads to indexers.")
@click.option(
    "--indexer",
    metavar="PATH|REPO",
    help="With --retention: the indexers.  [default: the preset's]",
)
@click.option("--config", metavar="FILE", help="A JSON file with the options below.")
@_training_options
def train(
    preset: str | None,
    model: str | None,
    data: str,
    out: str,
    resume: bool,
    rule: str,
    both: bool,
    retention: bool,
    indexer: str | None,
    config: str | None,
    **given: Any,
) -> None:
    """Train indexers, or search projections, for a model, which itself is not changed.

    With --both, train beside them the heads that say which entries of the cache later
    questions will need; with --retention, add such heads to indexers that are there.
    Ctrl-C stops a run after the step, and the same command with --resume goes on, to
    the same end.
    """
    if preset and model:
        raise click.UsageError("--preset and --model exclude each other here.")
    if both and retention:
        raise click.UsageError("--both trains indexers and heads: leave --retention out.")
    projections = rule == "projections"
    if projections and (both or retention):
        option = "--both" if both else "--retention"
        raise click.UsageError(f"retention heads stand beside indexers: leave {option} out.")
    kinds: list[Any] = [RetentionConfig] if retention else [TrainConfig, RetentionConfig][: 1 + both]
    settings = _settings([ProjectionsConfig] if projections else kinds, config, given)
    known = settings_from(preset=preset, model=model, indexer=indexer)
    name = known.model
    wanted: dict[str, Any] = {"resume": resume}
    if retention:
        if known.indexer is None:
            raise click.UsageError("--retention needs --indexer: name the indexers.")
        wanted["indexers"] = fetch(known.indexer, INDEXER_FILES)
    elif indexer:
        raise click.UsageError("--indexer goes with --retention.")
    if resume:
        _check_resume(Path(out))
    check_out(Path(out), resume)
    hint_at_blas()
    base, tokenizer = load_model(name)
    run = train_together if both else train_retention if retention else train_indexers
    run = train_projections if projections else run
    try:
        with Display() as display:
            result = run(base, tokenizer, data, out, *settings, progress=display, **wanted)
    except KeyboardInterrupt:
        begun = (Path(out) / CHECKPOINT).exists()
        again = " The same command with --resume goes on." if begun else ""
        click.echo(f"Stopped.{again}", err=True)
        sys.exit(130)
    _report(result)
    named = {"preset": preset, "model": model}
    for line in fitting_chat(named, result.path, settings[0]):
        click.echo(line)


def _check_resume(out: Path) -> None:
    """Refuse to begin anew where a run was to go on."""
    if not any((out / name).exists() for name in (CHECKPOINT, FINISHED)):
        raise click.UsageError(f"there is no run in {out} to go on with. Leave --resume out to begin one.")


def _report(result: TrainResult) -> None:
    best = ", ".join(f"{layer}: {_step(step)}" for layer, step in result.best_steps.items())
    click.echo(f"Best step of each layer: {best}")
    click.echo(f"Best steps together: {describe(result.scores)}")
    if worst := worst_layer(result.scores):
        click.echo(worst)
    click.echo(f"Wrote {result.path}")
    if result.left_out:
        click.echo(result.left_out, err=True)


def _step(step: int | list[int]) -> str:
    return "/".join(map(str, step)) if isinstance(step, list) else str(step)


def _settings(kinds: list[Any], config: str | None, given: dict[str, Any]) -> list[Any]:
    """Build configs of these kinds from a file and the command line, which goes over it."""
    fields_of = {kind: [field.name for field in fields(kind)] for kind in kinds}
    known = set().union(*fields_of.values())
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in known:
            where = "without --retention" if name in HELP else "with --retention or --both"
            if name in PROJECTIONS_HELP:
                where = "with --rule projections"
            elif ProjectionsConfig in kinds:
                where = "without --rule projections"
            raise click.UsageError(f"--{name.replace('_', '-')} goes {where}.")
    values = {**_read_config(config), **given}
    configs = []
    for kind in kinds:
        # A key that is in neither goes to the first, which refuses it.
        others = known.difference(fields_of[kind])
        configs.append(kind.from_dict({k: v for k, v in values.items() if k not in others}))
    return configs


def _read_config(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[train] {file} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"[train] {file} must hold a JSON object.")
    return values
