"""mlx-dsa compress: read a document once, to ask about it often."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..patch import SparsePatch
from ..presets import Settings, names_of, resolve_auto_of
from ..saved import load_cache, save_cache
from ..unfinished import UnfinishedReading
from .command import Command
from .conversation import Conversation
from .documents import Document, check_text, read_document, tell_skipped
from .interrupt import Interrupt
from .options import FiniteRange, describe_config, model_options, settings_from, sparse_options
from .outputs import OutputPath, check_output
from .progress import ReadingLines, reading_bar
from .session import Session, open_session
from .shades import places_of, share_of, tenths, write_page
from .stats import Report, entries, measure, megabytes

_LINES = 30.0  # seconds between two lines of a log


@click.command(cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=OutputPath(),
    help="The cache file to write.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the cache file, the report and a part file of another reading if they exist.",
)
@click.option(
    "--report",
    metavar="FILE.html",
    type=OutputPath(),
    help="Write a page too that shows the text, the darker the more layers keep a token.",
)
@click.option(
    "--save-every",
    metavar="SECONDS",
    type=FiniteRange(min=0),
    help="Where it is read by stream: write the part file as often; 0: after every chunk. "
    "Default: after every chunk, or as seldom as makes that 1/25 of the time.",
)
@click.option("--system", metavar="TEXT", help="A system message.")
@model_options
@sparse_options
def compress(
    files: tuple[str, ...],
    out: str,
    force: bool,
    report: str | None,
    save_every: float | None,
    system: str | None,
    **given: Any,
) -> None:
    """Read a document, prune it before any question, and save the cache.

    The document is a FILE, or several, or the text files in a folder and in the
    folders in it, in the order of their names: then each has a heading.

    mlx-dsa chat --cache-file goes on from it, with the same model, indexers and
    settings, which it finds in the file.

    With --prefill stream, which auto takes with --positions compact where indexers have
    retention heads, a document may be long: memory does not grow with it, and
    what is read is kept on the way in a part file, the cache file's name and .part.
    Where the command is stopped or killed, the same command goes on from there, to the
    same result; what was read since the part file was last written is read again. At
    the end the part file is deleted.
    """
    path, page = Path(out), Path(report) if report else None
    part_path = path.with_name(f"{path.name}.part")
    settings = resolve_auto_of(settings_from(**given))
    streams = _check(settings, path, page, save_every, force)
    if streams:
        check_output(part_path)
    document = read_document(files, [path, part_path, *([page] if page else [])])
    tell_skipped(document)
    check_text(system or "", "--system")
    about = {"file": document.name, **names_of(settings)}
    interrupt = Interrupt(_tell_interrupt)
    with open_session(settings, dense=False, temp=0.0, seed=0) as session:
        conversation = Conversation(session.model, session.tokenizer, system=system, stopped=interrupt)
        if page is not None:
            places_of(session.tokenizer, "a")  # it may not be able to tell
        part = None
        if streams:
            part = _open_part(part_path, session, document, system, save_every, force)
        with _told_how_to_go_on(part):
            start = time.perf_counter()
            with interrupt if part else _nothing(), _progress() as conversation.progress:
                text = conversation.read(document.text, part)
            session.sparse.prune(conversation.cache)
            seconds = part.seconds if part else time.perf_counter() - start
            path.parent.mkdir(parents=True, exist_ok=True)
            save_cache(path, conversation.cache, session.sparse, about)
            figures = measure(conversation.cache, None, None)
            if page is not None:
                _write_report(page, text, document, session, conversation.cache, figures)
        if part is not None:
            part.remove()
        start = time.perf_counter()
        load_cache(path, session.sparse)
        loading = time.perf_counter() - start
    click.echo(
        f"{path}: {figures.seen:,} tokens read in {seconds:.1f} s, {entries(figures)} "
        f"entries kept a layer, {megabytes(path.stat().st_size)} (dense "
        f"{megabytes(figures.dense_bytes)}). It loads in {loading:.2f} s."
    )
    if page is not None:
        click.echo(f"{page}: what is kept of the text.")


def _check(settings: Settings, path: Path, page: Path | None, save_every: float | None, force: bool) -> bool:
    """Refuse what could not be written, before anything is read; return whether it streams."""
    for file in filter(None, (path, page)):
        if file.exists() and not force:
            raise click.UsageError(f"{file} exists. Name another file, or give --force.")
    kind = settings.config.cache
    if kind == "tiered":
        raise click.UsageError("a tiered cache can't be saved. Leave --cache out, or use --cache full.")
    streams = settings.config.prefill == "stream"
    if save_every is not None and not streams:
        raise click.UsageError("--save-every has no effect without --prefill stream. Leave it out.")
    if page is not None:
        if kind == "full":
            raise click.UsageError("--report has no effect with --cache full, which keeps all. Leave it out.")
        if os.path.realpath(page) == os.path.realpath(path):
            raise click.UsageError("--out and --report are one file. Name two.")
    return streams


def _open_part(
    path: Path,
    session: Session,
    document: Document,
    system: str | None,
    every: float | None,
    force: bool,
) -> UnfinishedReading:
    template = getattr(session.tokenizer, "chat_template", None)
    identity = {
        "document": _digest(document.text.strip()),
        "system message": _digest(system or ""),
        "chat template": _digest(str(template)),
    }
    part = UnfinishedReading(path, session.sparse, identity, every)
    try:
        part.check()
    except ValueError:
        if not force:
            raise
        click.echo(f"Note: {path}, of another reading, is deleted, as --force says.", err=True)
        part.remove()
    if part.done:
        click.echo(f"{path}: going on after {part.done:,} tokens.", err=True)
    return part


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar at a terminal, else a line now and then."""
    if sys.stderr is not None and sys.stderr.isatty():
        with reading_bar() as update:
            yield update
    else:
        yield ReadingLines(_LINES)


def _tell_interrupt() -> None:
    click.echo("\nStopping after this chunk; Ctrl-C again stops at once.", err=True)


@contextmanager
def _told_how_to_go_on(part: UnfinishedReading | None) -> Iterator[None]:
    """Say at the end by Ctrl-C what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if part is None or not part.done:
            raise
        click.echo(
            f"Stopped: {part.path} has the first {part.done:,} tokens. The same command goes on from there.",
            err=True,
        )
        sys.exit(130)


def _write_report(
    page: Path,
    text: str,
    document: Document,
    session: Session,
    caches: list[Any],
    figures: Report,
) -> None:
    share = share_of(_kept(session.sparse, caches), figures.seen)
    body = document.text.strip()
    start, sections = text.rfind(body), document.sections
    if start < 0:  # the model's template has changed the text: nobody knows where its files begin
        start, body, sections = 0, text, None
    sections = [(name, start + at) for name, at in sections or tenths(body)]
    if start:
        sections.insert(0, ("Before the document", 0))
    of = share.counts.mean() / share.n_keepers
    facts = {
        "tokens read": f"{figures.seen:,}",
        "entries kept a layer": f"{entries(figures)}",
        "layers with a budget": f"{share.n_layers} of {len(caches)}",
        "kept, mean of these": f"{100 * of:.1f}%",
        "settings": describe_config(session.sparse.config),
    }
    places = places_of(session.tokenizer, text)
    write_page(page, text, places, share, sections, document.name, facts)


def _kept(patch: SparsePatch, caches: list[Any]) -> list[np.ndarray]:
    """Return of each layer that drops tokens the positions in the text that it keeps, or that
    each of its key heads does, where these keep their own: ``[heads, size]``."""
    budgets = (caches[i] for i in patch.layers if caches[i].evicts)
    return [np.array(cache.positions) for cache in budgets]
