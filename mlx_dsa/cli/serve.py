"""mlx-dsa serve: a model for many clients at once, over HTTP."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from .command import Command
from .options import (
    FiniteRange,
    add_options,
    dense_option,
    describe_config,
    max_tokens_option,
    model_options,
    settings_from,
    sparse_options,
    subject_name,
    think_option,
)
from .session import hint_at_blas

if TYPE_CHECKING:
    from ..serve import Server

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Bytes(click.ParamType):
    """A number of bytes: ``500MB``, ``2.5G``, ``1000000``."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return a number."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)b?", value.strip().lower())
        if not found:
            self.fail(f"{value!r} is no number of bytes, such as 500MB or 2G.", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


_AT = (
    click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="The port; 0 takes a free one."
    ),
    click.option(
        "--api-key", envvar="MLX_DSA_API_KEY", metavar="KEY", help="What clients must show. Also: MLX_DSA_API_KEY."
    ),
    click.option(
        "--allowed-origins",
        metavar="ORIGIN,...",
        help="Web pages of other hosts that may ask, as http://host:port; * for all.  [default: none]",
    ),
)
_BOUNDS = (
    click.option(
        "--max-context",
        type=click.IntRange(min=2),
        help="Tokens of a prompt and its answer.  [default: as the model has positions]",
    ),
    click.option(
        "--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait."
    ),
    click.option("--max-body", type=Bytes(), default="16MB", show_default=True, help="Bytes of a request."),
    click.option("--memory-limit", type=Bytes(), help="Bytes that MLX may hold.  [default: no limit]"),
    click.option(
        "--snapshot-bytes",
        type=Bytes(),
        default="2GB",
        show_default=True,
        help="Bytes of what is kept between requests.",
    ),
    click.option(
        "--decode-concurrency",
        type=click.IntRange(1, 4096),
        default=32,
        show_default=True,
        help="Answers that are written at once.",
    ),
    click.option(
        "--prompt-concurrency",
        type=click.IntRange(1, 4096),
        default=8,
        show_default=True,
        help="Prompts that are read at once.",
    ),
    click.option("--store", metavar="DIR", help="A folder for documents and what is kept, over restarts."),
)
_SAMPLING = (
    max_tokens_option(512),
    click.option("--temp", type=FiniteRange(0, 100), default=0.0, show_default=True, help="Sampling temperature."),
    click.option("--top-p", type=FiniteRange(0, 1), default=1.0, show_default=True, help="Nucleus sampling."),
    click.option("--min-p", type=FiniteRange(0, 1), default=0.0, show_default=True, help="Least share of the best."),
    click.option(
        "--sample-top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Sample from so many tokens."
    ),
)


def _at_options(command: Callable) -> Callable:
    return add_options(command, _AT)


def _own_options(command: Callable) -> Callable:
    return add_options(command, (*_SAMPLING, *_BOUNDS))


@click.command(cls=Command)
@_at_options
@model_options
@sparse_options
@dense_option
@think_option
@_own_options
def serve(
    dense: bool,
    think: bool | None,
    allowed_origins: str | None,
    sample_top_k: int,
    host: str,
    port: int,
    api_key: str | None,
    preset: str | None,
    model: str | None,
    config: str | None,
    max_context: int | None,
    max_queue: int,
    max_body: int,
    memory_limit: int | None,
    snapshot_bytes: int,
    decode_concurrency: int,
    prompt_concurrency: int,
    store: str | None,
    max_tokens: int,
    temp: float,
    top_p: float,
    min_p: float,
    **given: Any,
) -> None:
    """Serve a model to many clients at once.

    It answers as OpenAI's API does, at http://HOST:PORT/v1. Ctrl-C, or SIGTERM, lets the
    answers that are being written end; a second one stops at once.
    """
    # Not at the top: mlx-lm's server takes a second to import.
    try:
        from ..serve import ServeOptions, Server
        from ..serve.guard import is_loopback
        from ..serve.http import check_address
        from ..serve.provider import open_provider
    except ImportError as error:
        raise ValueError(f"[serve] this needs mlx-lm 0.32.2 or newer ({error}). Upgrade it.") from None

    if api_key == "" or api_key is None and os.environ.get("MLX_DSA_API_KEY") == "":
        raise click.UsageError("the key (--api-key or MLX_DSA_API_KEY) is empty. Give one, or leave it out.")
    if max_body < 1024:
        raise click.UsageError(f"--max-body must be at least 1024 bytes but got {max_body}.")
    origins = tuple(o.strip() for o in (allowed_origins or "").split(",") if o.strip())
    for origin in origins:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise click.UsageError(f"--allowed-origins takes http://host:port, or *, but got {origin!r}.")
    if store and Path(store).is_file():
        raise click.UsageError(f"--store takes a folder, and {store} is a file. Name another.")
    if dense and store:
        raise click.UsageError(
            "--store has no effect with --dense: only sparse caches have files. Leave one of them out."
        )
    settings = settings_from(dense=dense, preset=preset, model=model, config=config, **given)
    name = subject_name(settings, preset, model, config).removeprefix("preset ")
    options = ServeOptions(
        host=host,
        port=port,
        api_key=api_key or None,
        allowed_origins=origins,
        max_tokens=max_tokens,
        max_context=max_context,
        max_queue=max_queue,
        max_body=max_body,
        memory_limit=memory_limit,
        snapshot_bytes=snapshot_bytes,
        decode_concurrency=decode_concurrency,
        prompt_concurrency=prompt_concurrency,
        store=store,
        temp=temp,
        top_p=top_p,
        top_k=sample_top_k,
        min_p=min_p,
        think=think,
    )
    check_address(host, port)
    _log()
    hint_at_blas()
    server = Server(open_provider(settings, _short(name), options, dense), options)
    if not is_loopback(host) and not options.api_key:
        click.echo(f"Warning: anyone who reaches {host} may ask. Set --api-key.", err=True)
    running = server.provider.config
    how = describe_config(running) if running else "dense"
    click.echo(f"{server.name}: {how}", err=True)
    _run(server)


def _short(name: str) -> str:
    """Return a model's name as clients ask for it: of a folder on this machine, only its own."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("mlx_dsa.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _run(server: Server) -> None:
    asked = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.start()
    # Whoever starts this program reads where to ask.
    click.echo(f"Listening at {server.url}")
    sys.stdout.flush()
    # In steps: a wait without an end keeps some systems from telling of signals.
    while not asked.wait(0.5) and server.generation.is_healthy:
        pass
    if not asked.is_set():
        server.stop()
        raise RuntimeError("the generation thread has ended")
    click.echo("Stopping: the answers that are being written end first.", err=True)
    server.drain()
    server.stop()
