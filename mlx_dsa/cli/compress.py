"""mlx-dsa compress: read a document once, to ask about it often."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..presets import names_of
from ..saved import load_cache, save_cache
from .command import Command
from .conversation import Conversation
from .documents import read_text
from .options import model_options, settings_from, sparse_options
from .outputs import OutputPath
from .progress import reading_bar
from .session import open_session
from .stats import entries, measure, megabytes


@click.command(cls=Command)
@click.argument("file", metavar="FILE")
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=OutputPath(),
    help="The cache file to write.",
)
@click.option("--force", is_flag=True, help="Replace the cache file if it exists.")
@click.option("--system", metavar="TEXT", help="A system message.")
@model_options
@sparse_options
def compress(file: str, out: str, force: bool, system: str | None, **given: Any):
    """Read the document FILE, prune it before any question, and save the cache.

    mlx-dsa chat --cache-file goes on from it, with the same model, indexers and
    settings, which it finds in the file.
    """
    path = Path(out)
    if path.exists() and not force:
        raise click.UsageError(f"{path} exists. Name another file, or give --force.")
    document = read_text(file)
    settings = settings_from(**given)
    if settings.config.cache == "tiered":
        raise click.UsageError(
            "a tiered cache can't be saved. Leave --cache out, or use --cache full."
        )
    about = {"file": Path(file).name, **names_of(settings)}
    with open_session(settings, dense=False, temp=0.0, seed=0) as session:
        conversation = Conversation(session.model, session.tokenizer, system=system)
        start = time.perf_counter()
        with reading_bar() as conversation.progress:
            conversation.read(document)
        session.patch.prune(conversation.cache)
        seconds = time.perf_counter() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        save_cache(path, conversation.cache, session.patch, about)
        report = measure(conversation.cache, None, None)
        start = time.perf_counter()
        load_cache(path, session.patch)
        loading = time.perf_counter() - start
    click.echo(
        f"{path}: {report.seen:,} tokens read in {seconds:.1f} s, {entries(report)} "
        f"entries kept a layer, {megabytes(path.stat().st_size)} (dense "
        f"{megabytes(report.dense_bytes)}). It loads in {loading:.2f} s."
    )
