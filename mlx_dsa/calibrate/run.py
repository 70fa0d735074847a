"""A calibration: texts are read one by one, what layers show is added up, and a file is written."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..calibrated import Calibration, digits_of, save_calibration
from ..families import family_of
from ..files import replacing
from ..train.data import fingerprint, load_sequences
from ..train.report import Report
from ..train.state import CHECKPOINT, check_out
from ..train.teacher import check_model, layer_views
from .channels import Channels
from .config import CalibrateConfig, CalibrateProgress, CalibrateResult
from .finder import Finder, Found
from .patterns import Patterns
from .windows import Windows

# By the rule of selecting that reads what they find.
CALIBRATIONS: dict[str, type[Finder]] = {finder.kind: finder for finder in (Channels, Patterns, Windows)}


def calibrate(
    model: Any,
    tokenizer: Any,
    data: str | os.PathLike,
    out: str | os.PathLike,
    rule: str,
    config: CalibrateConfig,
    *,
    name: str = "a model without a name",
    resume: bool = False,
    progress: Callable[[CalibrateProgress], None] | None = None,
) -> CalibrateResult:
    """Find on text what a rule of selecting reads of a model's heads.

    Args:
        model: A model of mlx-lm, of a known family, unpatched. It is not changed.
        tokenizer, data: As in :func:`~mlx_dsa.train.train_indexers`.
        out (str or PathLike): The folder for the checkpoint, and at the end for
          ``indexers.safetensors`` with its ``run_config.json``. It must be new or empty,
          unless ``resume`` is set.
        rule (str): A key of ``CALIBRATIONS``.
        config (CalibrateConfig): The calibration.
        name (str): What the file calls the model. Default: ``"a model without a name"``.
        resume (bool): Go on from the checkpoint in ``out``, which must be of this same
          calibration; where there is none yet, begin. Default: ``False``.
        progress (callable, optional): Called with a :class:`CalibrateProgress` after every
          sequence, once that is saved; what it raises ends the run.

    Returns:
        CalibrateResult: The file, and what was found.

    Raises:
        ValueError: If the rule takes no calibration, the model is of another type or
          patched, the data is missing or too short, or ``out`` holds another or a finished run.
    """
    if rule not in CALIBRATIONS:
        raise ValueError(f"[calibrate] 'rule' must be one of {', '.join(CALIBRATIONS)} but got {rule!r}.")
    out, finder = Path(out), CALIBRATIONS[rule](config)
    if config.sequence_length <= finder.shortest:
        raise ValueError(
            f"[calibrate] 'sequence_length' must exceed {finder.shortest} but got {config.sequence_length}: "
            f"queries that see no more than top_k keys read all. Use longer sequences, or a smaller top_k."
        )
    check_model(model)
    check_out(out, resume)
    layers, report = family_of(model).layers(model), Report()
    sequences = load_sequences(
        data, tokenizer, config.sequence_length, finder.shortest, config.sequences, report=report
    )
    digits = {i: digits_of(layer) for i, layer in layers.items()}
    identity = {
        "rule": rule,
        "model": digits[max(digits)],
        "data": fingerprint(sequences)[:16],
        "config": dataclasses.asdict(config),
    }
    done, sums = (_load(out, identity) if resume else None) or (0, {})
    began = time.perf_counter()

    def tell() -> None:
        if progress is not None:
            tokens = sum(len(s.tokens) for s in sequences[:done])
            progress(CalibrateProgress(done, len(sequences), tokens, time.perf_counter() - began))

    tell()
    for sequence in sequences[done:]:
        for i, view in layer_views(model, mx.array(sequence.tokens)[None], config.chunk_size):
            there, new = sums.get(i, {}), finder.measure(layers[i], view)
            sums[i] = {key: value + there.get(key, 0) for key, value in new.items()}
            mx.eval(sums[i])
        done += 1
        _save(out, identity, done, sums)
        tell()
    found, told = finder.conclude(sums)
    if len(sequences) < config.sequences:
        told.append(f"The text has {len(sequences)} of the {config.sequences} sequences that were asked for.")
    made = {i: Calibration(rule, found[i], name, digits[i]) for i in found}
    about = {"calibrate": dataclasses.asdict(config), "sequences": len(sequences), "told": told}
    path = save_calibration(out, made, about)
    (out / CHECKPOINT).unlink()
    return CalibrateResult(path, tuple(told), str(report))


def _save(out: Path, identity: dict[str, Any], done: int, sums: dict[int, Found]) -> None:
    """Write the checkpoint: the old one or the new one is there, never half of one."""
    out.mkdir(parents=True, exist_ok=True)
    flat = {f"{i}.{name}": value for i, of_layer in sums.items() for name, value in of_layer.items()}
    with replacing(out / CHECKPOINT) as part:
        mx.save_safetensors(str(part), flat, {"run": json.dumps({"identity": identity, "done": done})})


def _load(out: Path, identity: dict[str, Any]) -> tuple[int, dict[int, Found]] | None:
    """Return how many sequences a checkpoint has seen, and its sums; ``None`` without one."""
    file = out / CHECKPOINT
    if not file.exists():
        return None
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)  # of its forms, a pair
        arrays, meta = loaded
        mx.eval(arrays)  # loading is lazy: a short file shows only here
        run = json.loads(meta["run"])
        there, done = run["identity"], run["done"]
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"[calibrate] {file} is not a checkpoint of a calibration ({error}).") from None
    for name, mine in identity.items():
        if there.get(name) != mine:
            raise ValueError(
                f"[calibrate] {out} holds a run with another {name}. Choose another folder, or resume with "
                f"what that run began with."
            )
    sums: dict[int, Found] = {}
    for name, value in arrays.items():
        layer, _, part = name.partition(".")
        sums.setdefault(int(layer), {})[part] = value
    return done, sums
