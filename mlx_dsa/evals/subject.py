"""The model under evaluation, and the checks that every evaluator makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import SparseConfig
from ..families import family_of
from ..presets import Preset
from ..reach import reach_with
from .policies import DENSE, Policy


def describe(subject: Preset, name: str | None = None) -> dict[str, Any]:
    """Return what a result file says of a model.

    Args:
        subject (Preset): the model with its tokenizer, indexers and config.
        name (str): what it was loaded as. Default: ``None``, left out.
    """
    family = family_of(subject.model)
    args = family.args(subject.model)
    shape = {k: getattr(args, k) for k in ("hidden_size", "num_hidden_layers", "vocab_size")}
    dtype = next(iter(family.layers(subject.model).values())).dtype
    model = {
        "name": name,
        "type": subject.model.model_type,
        **shape,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "weights": _fingerprint_of(subject.model.parameters()),
    }
    trained = {i: indexer for i, indexer in subject.indexers.items() if indexer is not None}
    indexers = {str(i): indexer.parameters() for i, indexer in sorted(trained.items())}
    return {"model": model, "indexers": len(indexers), "indexer_weights": _fingerprint_of(indexers)}


def _fingerprint_of(parameters: dict[str, Any]) -> str:
    """Return a hash of the beginnings of all arrays: what was trained further has another."""
    beginnings = {
        name: array.reshape(-1)[:64].astype(mx.float32).tolist() for name, array in sorted(tree_flatten(parameters))
    }
    return fingerprint(beginnings)


def policies_config(policies: Iterable[Policy], indexers: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Return what a result file says of its policies, with the prefill that "auto" takes."""
    return [
        {"label": p.label, "scorer": p.scorer, "config": p.config and _config_of(p.config)}
        for p in (policy.resolved(indexers) for policy in policies)
    ]


def _config_of(config: SparseConfig) -> dict[str, Any]:
    # Results from before there were rules of selecting don't name theirs.
    said = dict(vars(config))
    return said if config.select != "lightning" else {k: v for k, v in said.items() if k != "select"}


def check_lengths(
    where: str,
    subject: Preset,
    lengths: Sequence[int],
    options: str = "--lengths",
    policies: Iterable[Policy] = (DENSE,),
    written: int = 0,
) -> None:
    """Refuse texts that a model has no positions for, or that are no lengths at all.

    Args:
        where (str): the evaluator.
        subject (Preset): the model.
        lengths (list of int): tokens of the contexts, with what is written after each.
        options (str): what makes them shorter. Default: ``"--lengths"``.
        policies (list of Policy): how they are read. Default: by the dense model.
        written (int): tokens that are written at once, at most. Default: ``0``.

    Raises:
        ValueError: if a length is below 1 or above the model's positions, or there is none.
    """
    if not lengths:
        raise ValueError(f"[{where}] 'lengths' must name at least one context length.")
    for length in lengths:
        if length < 1:
            raise ValueError(f"[{where}] 'lengths' must be above 0 but got {length}.")
    for policy in policies:
        reach = reach_with(subject.model, subject.indexers, policy.config)
        of = f"{where}, policy {policy.label}"
        reach.check(of, reach.most(max(lengths), written), f"Lower {options}")


def fingerprint(value: Any) -> str:
    """Return a short hash of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
