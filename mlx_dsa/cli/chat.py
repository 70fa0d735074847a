"""mlx-dsa chat: ask, and ask again, over a cache that stays between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from ..evals.facts import user_message
from ..saved import load_cache
from .command import Command
from .conversation import Conversation, check_prompt
from .documents import read_text
from .interrupt import Interrupt
from .options import check_seed, dense_option, generation_options
from .options import model_options, settings_from, sparse_options
from .progress import reading_bar
from .session import open_session
from .stats import describe

_HELP = "Ctrl-C ends an answer; /reset starts over; /exit or Ctrl-D leaves."


@click.command(cls=Command)
@click.option("--prompt", metavar="TEXT", help="Ask this, and leave after the answer.")
@click.option("--interactive", is_flag=True, help="Go on asking after --prompt.")
@click.option("--file", metavar="FILE", help="A text to put before the first question.")
@click.option(
    "--cache-file", metavar="FILE", help="A document that mlx-dsa compress has read."
)
@click.option("--system", metavar="TEXT", help="A system message.")
@model_options
@sparse_options
@dense_option
@generation_options
def chat(
    prompt: str | None,
    interactive: bool,
    file: str | None,
    cache_file: str | None,
    system: str | None,
    dense: bool,
    max_tokens: int,
    temp: float,
    seed: int | None,
    **given: Any,
):
    """Chat with a model, about a document if you like.

    Without --prompt, questions are read from the terminal, one a line. After
    each answer one line tells what it took.
    """
    seed = check_seed(seed, temp)
    if cache_file is not None:
        for name, value in (("file", file), ("system", system), ("dense", dense)):
            if value:
                raise click.UsageError(
                    f"--{name} has no effect with --cache-file. Leave one of them out."
                )
    settings = settings_from(dense=dense, cache_file=cache_file, **given)
    document = read_text(file) if file else None
    if prompt is not None:
        check_prompt(prompt)
    interactive = interactive or prompt is None
    with open_session(settings, dense=dense, temp=temp, seed=seed) as session:
        interrupt = Interrupt()
        conversation = Conversation(
            session.model,
            session.tokenizer,
            system=system,
            max_tokens=max_tokens,
            sampler=session.sampler,
            stopped=interrupt,
            begin=(lambda: load_cache(cache_file, session.patch).caches)
            if cache_file is not None
            else None,
        )
        if interactive and sys.stdin.isatty():
            click.echo(_HELP, err=True)
        for question in _questions(prompt, interactive):
            if question == "/reset":
                conversation.reset()
                click.echo("Everything said so far is forgotten.", err=True)
                continue
            if document is not None and not conversation.started:
                question = user_message(document, question)
            _answer(conversation, question, interrupt, dense)


def _questions(prompt: str | None, interactive: bool) -> Iterator[str]:
    if prompt is not None:
        yield prompt
    while interactive:
        try:
            question = input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(f"\n{_HELP}", err=True)
            continue
        if question == "/exit":
            return
        if question:
            yield question


def _answer(
    conversation: Conversation, question: str, interrupt: Interrupt, dense: bool
):
    with interrupt, reading_bar() as conversation.progress:
        for text in conversation.ask(question):
            click.echo(text, nl=False)
    click.echo()
    click.secho(describe(conversation.report, dense=dense), dim=True, err=True)
