"""mlx-dsa demo: the same prompts dense and sparse, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from rich.live import Live

from ..config import override
from ..crossovers import resolve_auto
from ..patch import patch_sparse_generate
from ..presets import Preset, load_settings, resource
from ..tasks.facts import user_message
from .columns import Column, columns
from .command import Command
from .conversation import Conversation, check_prompt
from .documents import read_text
from .lines import LEAVE, open_lines
from .options import describe_config, model_options, settings_from, sparse_options
from .session import hint_at_blas

_NAMES = {  # cache -> title
    "full": "sparse, all kept",
    "budget": "sparse, budget",
    "tiered": "sparse, rest cold",
}
_SHOWN = ("full", "budget")  # where none is named
_NOTE = (
    "A budget is chosen by what the retention heads expect to be needed, not by the "
    "question. Keeping all entries saves time, a budget saves memory as well."
)


class Prompt(NamedTuple):
    """One prompt of the demo.

    Args:
        title (str): What it shows.
        text (str): The whole prompt.
        shown (str): What the reader sees of it.
        raw (bool): Continue it, without the chat template. Default: ``False``.
        max_tokens (int): Tokens of the answer. Default: ``128``.
        temp (float): Sampling temperature; every side draws with the same seed.
          Default: ``0.0``.
    """

    title: str
    text: str
    shown: str
    raw: bool = False
    max_tokens: int = 128
    temp: float = 0.0


@click.command(cls=Command)
@click.option("--prompt", metavar="TEXT", help="Ask this instead.")
@click.option("--interactive", is_flag=True, help="Ask questions of your own.")
@click.option("--file", metavar="FILE", help="A text to put before each question.")
@model_options
@sparse_options
def demo(prompt: str | None, interactive: bool, file: str | None, **given: Any) -> None:
    """Answer prompts dense and sparse, side by side.

    Each prompt starts anew. Without options: three prompts on the bundled model,
    with a cache that keeps every entry and with one that keeps top-k of them.
    """
    if file is not None and prompt is None and not interactive:
        raise click.UsageError("--file needs a question: --prompt or --interactive.")
    if prompt is not None:
        check_prompt(prompt)
    settings = settings_from(**given)
    cache = settings.config.cache
    caches = (cache,) if given["cache"] or cache not in _SHOWN else _SHOWN
    document = read_text(file) if file else None
    hint_at_blas()
    preset = load_settings(settings)
    console = Console()
    config = resolve_auto(preset.config, preset.indexers)
    console.print(f"{settings.model}: {describe_config(config)}", soft_wrap=True)
    own = prompt is not None or interactive
    for item in _own(prompt, interactive, document) if own else _bundled():
        _compare(preset, caches, item, console)
    if "budget" in caches and not own:
        console.print(f"\n{_NOTE}", soft_wrap=True)


def _bundled() -> Iterator[Prompt]:
    folder = resource("prompts")
    for item in json.loads((folder / "demo.json").read_text(encoding="utf-8")):
        document = read_text(folder / item["file"]) if "file" in item else None
        question = item.get("prompt")
        yield Prompt(
            item["title"],
            _join(document, question),
            _excerpt(document, question),
            item.get("raw", False),
            item.get("max_tokens", 128),
            item.get("temp", 0.0),
        )


def _own(prompt: str | None, interactive: bool, document: str | None) -> Iterator[Prompt]:
    if prompt is not None:
        yield Prompt("", _join(document, prompt), prompt)
    if not interactive:
        return
    with open_lines() as lines:
        while True:
            try:
                question = lines.read().strip()
            except EOFError:
                return
            if question.lower() in LEAVE:
                return
            if question:
                yield Prompt("", _join(document, question), "")


def _join(document: str | None, question: str | None) -> str:
    if document and question:
        return user_message(document, question)
    return document or question or ""


def _excerpt(document: str | None, question: str | None) -> str:
    if document is None:
        return question or ""
    words = document.split()
    if question is None:
        return f"[{len(words):,} words] ... {' '.join(words[-30:])}"
    return f"{' '.join(words[:12])} ... [{len(words):,} words] {question}"


def _compare(preset: Preset, caches: tuple[str, ...], prompt: Prompt, console: Console) -> None:
    """Answer a prompt dense, then sparse, and show the answers as they come."""
    if prompt.title:
        console.print(f"\n[bold]{prompt.title}[/bold]")
    if prompt.shown:
        console.print(prompt.shown, style="cyan", markup=False, highlight=False)
    if prompt.temp:
        console.print(
            f"Sampled at temperature {prompt.temp}: sides differ by chance, and a model as "
            f"small as the bundled one rambles, dense or sparse.",
            style="dim",
            soft_wrap=True,
        )
    dense, *sparse = table = [Column("dense"), *(Column(_NAMES[c]) for c in caches)]
    with Live(console=console, refresh_per_second=8) as live:

        def show() -> None:
            live.update(columns(table))

        _answer(preset, prompt, dense, show)
        for cache, column in zip(caches, sparse):
            config = override(vars(preset.config), {"cache": cache})
            with patch_sparse_generate(preset.model, preset.indexers, **config):
                _answer(preset, prompt, column, show)
    if not console.is_terminal:
        console.print()


def _answer(preset: Preset, prompt: Prompt, column: Column, show: Callable[[], None]) -> None:
    def progress(done: int, total: int) -> None:
        column.read(done, total)
        show()

    mx.random.seed(0)
    conversation = Conversation(
        preset.model,
        preset.tokenizer,
        max_tokens=prompt.max_tokens,
        sampler=make_sampler(prompt.temp),
        progress=progress,
    )
    ask = conversation.complete if prompt.raw else conversation.ask
    for piece in ask(prompt.text):
        column.answer += piece
        show()
    column.report = conversation.report
    show()
