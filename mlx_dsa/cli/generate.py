"""mlx-dsa generate: one prompt in, the answer out."""

from __future__ import annotations

import sys
from typing import Any

import click

from .command import Command
from .conversation import Conversation, check_prompt
from .documents import read_text
from .interrupt import Interrupt
from .options import check_seed, dense_option, generation_options
from .options import model_options, settings_from, sparse_options
from .progress import reading_bar
from .session import open_session
from .stats import describe


@click.command(cls=Command)
@click.option("--prompt", metavar="TEXT", help="The prompt.")
@click.option("--file", metavar="FILE", help="A file that holds the prompt.")
@click.option("--raw", is_flag=True, help="Continue the text: no chat template.")
@model_options
@sparse_options
@dense_option
@generation_options
def generate(
    prompt: str | None,
    file: str | None,
    raw: bool,
    dense: bool,
    max_tokens: int,
    temp: float,
    seed: int | None,
    **given: Any,
):
    """Answer one prompt, or continue a text with --raw.

    The prompt is --prompt, a file, or standard input. The answer goes to
    standard output, and a line on what it took to standard error.
    """
    seed = check_seed(seed, temp)
    settings = settings_from(dense=dense, **given)
    text = _prompt_text(prompt, file)
    check_prompt(text)
    with open_session(settings, dense=dense, temp=temp, seed=seed) as session:
        interrupt = Interrupt()
        conversation = Conversation(
            session.model,
            session.tokenizer,
            max_tokens=max_tokens,
            sampler=session.sampler,
            stopped=interrupt,
        )
        with interrupt, reading_bar() as conversation.progress:
            pieces = conversation.complete(text) if raw else conversation.ask(text)
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        click.secho(describe(conversation.report, dense=dense), dim=True, err=True)
    if interrupt():
        sys.exit(130)


def _prompt_text(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --file exclude each other here.")
    if prompt is not None:
        return prompt
    if file is not None:
        return read_text(file)
    if sys.stdin.isatty():
        raise click.UsageError("Give --prompt or --file, or pipe a text in.")
    return sys.stdin.read()
