"""The command mlx-dsa."""

from __future__ import annotations

import warnings
from typing import Any

import click

from .. import __version__
from .bench import bench
from .calibrate import calibrate
from .chat import chat
from .command import in_options
from .compress import compress
from .convert import convert
from .demo import demo
from .errors import Boundary
from .eval import evaluate
from .generate import generate
from .info import info
from .serve import serve
from .train import train
from .tune import tune


@click.group(cls=Boundary, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-dsa")
def main() -> None:
    """Long contexts for Qwen and Llama models, from a KV cache of fixed size.

    A small trained network a layer selects the keys that matter to each query.
    Without options the commands use a small model that is bundled. To begin,
    try: mlx-dsa chat
    """
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_args: Any, **_options: Any) -> None:
    context = click.get_current_context(silent=True)
    text = in_options(str(message), context.command) if context else message
    click.echo(f"Note: {text}", err=True)


for _command in (chat, generate, compress, serve, train, calibrate, convert, info, demo, evaluate, bench, tune):
    main.add_command(_command)
