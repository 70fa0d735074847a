"""mlx-dsa generate: one prompt in, the answer out."""

from __future__ import annotations

import sys
from typing import Any

import click

from .command import Command
from .conversation import Conversation, check_prompt
from .documents import read_standard_input, read_texts
from .interrupt import Interrupt
from .options import (
    check_seed,
    dense_option,
    generation_options,
    model_options,
    settings_from,
    sparse_options,
    think_option,
)
from .progress import reading_bar
from .session import open_session
from .stats import show_report


@click.command(cls=Command)
@click.option("--prompt", metavar="TEXT", multiple=True, help="The prompt.")
@click.option(
    "--file",
    "files",
    metavar="FILE",
    multiple=True,
    help="A file that holds the prompt, or a part of it: they are read in order.",
)
@click.option("--raw", is_flag=True, help="Continue the text: no chat template.")
@model_options
@sparse_options
@dense_option
@think_option
@generation_options
def generate(
    prompt: tuple[str, ...],
    files: tuple[str, ...],
    raw: bool,
    think: bool | None,
    dense: bool,
    max_tokens: int,
    temp: float,
    seed: int | None,
    **given: Any,
) -> None:
    """Answer one prompt, or continue a text with --raw.

    The prompt is --prompt, a file, or standard input. The answer goes to
    standard output, and a line on what it took to standard error.
    """
    seed = check_seed(seed, temp)
    if raw and think is not None:
        raise click.UsageError("--think and --no-think have no effect with --raw.")
    settings = settings_from(dense=dense, **given)
    text = _prompt_text(prompt, files)
    check_prompt(text)
    with open_session(settings, dense=dense, temp=temp, seed=seed) as session:
        interrupt = Interrupt()
        conversation = Conversation(
            session.model,
            session.tokenizer,
            think=think,
            max_tokens=max_tokens,
            sampler=session.sampler,
            stopped=interrupt,
        )
        with interrupt, reading_bar() as conversation.progress:
            pieces = conversation.complete(text) if raw else conversation.ask(text)
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        assert conversation.report is not None  # of the pieces that are shown
        show_report(conversation.report, dense=dense)
    if interrupt():
        sys.exit(130)


def _prompt_text(prompt: tuple[str, ...], files: tuple[str, ...]) -> str:
    if len(prompt) > 1:
        raise click.UsageError("--prompt is given twice. Leave one of them out.")
    if prompt and files:
        raise click.UsageError("--prompt and --file exclude each other here.")
    if prompt:
        return prompt[0]
    if files:
        return read_texts(files)
    if sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("Give --prompt or --file, or pipe a text in.")
    return read_standard_input()
