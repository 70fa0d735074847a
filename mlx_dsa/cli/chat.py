"""mlx-dsa chat: ask, and ask again, over a cache that stays between turns."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import click

from ..saved import load_cache
from ..tasks.facts import user_message
from .command import Command
from .conversation import Conversation, check_prompt
from .documents import check_text, read_document, tell_skipped
from .errors import one_line
from .interrupt import Interrupt
from .lines import LEAVE, PipedLines, TypedLines, open_lines
from .options import (
    check_seed,
    dense_option,
    describe_config,
    generation_options,
    model_options,
    open_saved,
    settings_from,
    sparse_options,
    think_option,
)
from .progress import reading_bar
from .session import open_session
from .stats import show_report

_HINT = "Ctrl-C ends an answer; /help tells more; /exit or Ctrl-D leaves."
_HELP = """\
/help       this
/reset      forget what was said
/exit       leave; so do /quit, exit, quit and Ctrl-D
Ctrl-C      end an answer; twice: leave
Esc, Enter  begin another line of the same question; pasted lines stay one question
Up, Down    earlier questions"""


@click.command(cls=Command)
@click.option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    help="Ask this, and leave after the answer. More than one are asked in order.",
)
@click.option("--interactive", is_flag=True, help="Go on asking after --prompt.")
@click.option(
    "--file",
    "files",
    metavar="FILE",
    multiple=True,
    help="A text to put before the first question. More than one are put in order, each under "
    "a heading, and so are the text files in a folder.",
)
@click.option("--cache-file", metavar="FILE", help="A document that mlx-dsa compress has read.")
@click.option("--system", metavar="TEXT", help="A system message.")
@model_options
@sparse_options
@dense_option
@think_option
@generation_options
def chat(
    prompts: tuple[str, ...],
    interactive: bool,
    files: tuple[str, ...],
    cache_file: str | None,
    system: str | None,
    dense: bool,
    think: bool | None,
    max_tokens: int,
    temp: float,
    seed: int | None,
    **given: Any,
) -> None:
    """Chat with a model, about a document if you like.

    Without --prompt, questions are read from the terminal, or from standard input,
    one a line. After each answer one line tells what it took.
    """
    seed = check_seed(seed, temp)
    if cache_file is not None:
        for name, value in (("file", files), ("system", system)):
            if value:
                raise click.UsageError(f"--{name} has no effect with --cache-file. Leave one of them out.")
    saved = open_saved(cache_file, dense)
    settings = settings_from(dense=dense, saved=saved, **given)
    document = None
    if files:
        found = read_document(files)
        tell_skipped(found)
        document = found.text
    check_text(system or "", "--system")
    for prompt in prompts:
        check_prompt(prompt)
    interactive = interactive or not prompts
    # First of all: what is typed while the model loads is kept, too.
    with (
        open_lines() if interactive else nullcontext() as lines,
        open_session(settings, dense=dense, temp=temp, seed=seed) as session,
    ):
        interrupt = Interrupt()
        conversation = Conversation(
            session.model,
            session.tokenizer,
            system=system,
            think=think,
            max_tokens=max_tokens,
            sampler=session.sampler,
            stopped=interrupt,
            begin=(lambda: load_cache(cache_file, session.sparse).caches) if cache_file is not None else None,
        )
        conversation.check(document or "-")
        how = describe_config(session.patch.config) if session.patch else "dense"
        click.echo(f"{settings.model}: {how}", err=True)
        talk = _Talk(conversation, interrupt, document, dense)
        for prompt in prompts:
            talk.ask(prompt)
            if not interactive and interrupt():
                sys.exit(130)
        if lines is not None:
            talk.go_on(lines)


class _Talk(NamedTuple):
    """A conversation with the one who types; its document comes before the first question."""

    conversation: Conversation
    interrupt: Interrupt
    document: str | None
    dense: bool

    def ask(self, question: str) -> None:
        """Show the answer to a question, and what it took."""
        self._show(self._start(question))

    def go_on(self, lines: PipedLines | TypedLines) -> None:
        """Ask what is typed or piped in, until there is no more."""
        at_terminal = isinstance(lines, TypedLines)
        if at_terminal:
            click.echo(_HINT, err=True)
        while True:
            try:
                line = lines.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                click.echo(_HINT, err=True)
                continue
            except ValueError as error:
                self._refuse(error)
                continue
            if line.lower() in LEAVE:
                return
            if line:
                self._obey(line)
            if self.interrupt() and not at_terminal:
                sys.exit(130)

    def _obey(self, line: str) -> None:
        if line.lower() == "/help":
            click.echo(_HELP, err=True)
        elif line.lower() == "/reset":
            self.conversation.reset()
            click.echo("Everything said so far is forgotten.", err=True)
        elif re.fullmatch(r"/[A-Za-z]+", line):
            click.echo(f"There is no {line}. /help names what there is.", err=True)
        else:
            try:
                pieces = self._start(line)
            except ValueError as error:
                self._refuse(error)
            else:
                self._show(pieces)

    def _start(self, question: str) -> Iterator[str]:
        if self.document is not None and not self.conversation.started:
            question = user_message(self.document, question)
        return self.conversation.ask(question)

    def _show(self, pieces: Iterator[str]) -> None:
        with self.interrupt:
            with reading_bar() as self.conversation.progress:
                for piece in pieces:
                    click.echo(piece, nl=False)
            click.echo()
            report = self.conversation.report
            assert report is not None  # of the pieces that are shown
            show_report(report, dense=self.dense)
            if report.unread:
                click.echo(
                    "The rest is read with the next question; /reset forgets all of it.",
                    err=True,
                )

    def _refuse(self, error: ValueError) -> None:
        stays = " What was said stays; /reset forgets it." if self.conversation.started else ""
        click.echo(f"Error: {one_line(error)}{stays}", err=True)
