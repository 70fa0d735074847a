"""mlx-dsa calibrate: find on text what a rule of selecting reads of a model's heads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..calibrate import CALIBRATIONS, CalibrateConfig, CalibrateProgress
from ..calibrate import calibrate as run_calibration
from ..presets import load_model
from ..train.state import CHECKPOINT, check_out
from .command import Command
from .options import settings_from
from .runs import RunDisplay, run_options
from .session import hint_at_blas

HELP = {
    "sequences": "Sequences of text that are read.",
    "sequence_length": "Tokens of a sequence.",
    "chunk_size": "Tokens a chunk of the model's pass.",
    "top_k": "Keys that a query will read.",
    "n_sink": "First keys, always read.",
    "n_recent": "Newest keys, likewise.",
    "density": "Mixture: share of the keys that heads read on average.",
}


def _config_options(command: Callable) -> Callable:
    defaults = {field.name: field.default for field in fields(CalibrateConfig)}
    for name in reversed(HELP):
        text = f"{HELP[name]}  [default: {defaults[name]}]"
        command = click.option("--" + name.replace("_", "-"), type=type(defaults[name]), help=text)(command)
    return command


@click.command(cls=Command)
@click.option("--rule", type=click.Choice(list(CALIBRATIONS)), required=True, help="The rule of selecting (--select).")
@run_options
@_config_options
def calibrate(
    rule: str, preset: str | None, model: str | None, data: str, out: str, resume: bool, **given: Any
) -> None:
    """Find on text what a rule of selecting reads of a model's heads.

    Nothing is trained, and the model is not changed. The file is for this model alone.
    Ctrl-C stops after a sequence, and the same command with --resume goes on, to the same end.
    """
    if preset and model:
        raise click.UsageError("--preset and --model exclude each other here.")
    config = CalibrateConfig(**{name: value for name, value in given.items() if value is not None})
    CALIBRATIONS[rule](config)  # what is wrong shows before a long load
    check_out(Path(out), resume)
    if resume and not (Path(out) / CHECKPOINT).exists():
        raise click.UsageError(f"there is no run in {out} to go on with. Leave --resume out to begin one.")
    hint_at_blas()
    named = settings_from(preset=preset, model=model).model
    base, tokenizer = load_model(named)
    # A folder's own name tells as much elsewhere, and less of this machine.
    name = Path(named).expanduser().resolve().name if Path(named).expanduser().exists() else named
    try:
        with Display() as display:
            result = run_calibration(
                base, tokenizer, data, out, rule, config, name=name, resume=resume, progress=display
            )
    except KeyboardInterrupt:
        again = " The same command with --resume goes on." if (Path(out) / CHECKPOINT).exists() else ""
        click.echo(f"Stopped.{again}", err=True)
        sys.exit(130)
    for line in result.told:
        click.echo(line)
    click.echo(f"Wrote {result.path}. Use it with --select {rule} --indexer {out} --cache full.")
    if result.left_out:
        click.echo(result.left_out, err=True)


class Display(RunDisplay):
    """Show how many sequences are read, and how fast."""

    def __init__(self) -> None:
        super().__init__("Calibrating", "reading the data", "sequence")
        self._first: CalibrateProgress | None = None

    def __call__(self, now: CalibrateProgress) -> None:
        if self._first is None:
            self._first = now
            self.begin()
        tokens = now.tokens - self._first.tokens
        speed = f"{tokens / now.seconds:,.0f} tokens/s" if tokens and now.seconds > 0 else ""
        self.show(now.done, now.total, speed)
        self.stop_if_asked(now.done, now.total)
