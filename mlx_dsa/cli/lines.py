"""Lines that a user types, pastes or pipes in, each of them whole."""

from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path
from typing import Any

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.utils import is_dumb_terminal

from ..crossovers import crossover_file
from .documents import decode

LEAVE = ("/exit", "/quit", "exit", "quit")  # what ends a talk, in any case

_PASTED = 16  # keys in one go that nobody types
_PAUSE = 0.02  # seconds without a key that end a paste
_LONGEST_KEPT = 10_000  # characters of a line in the history's file


class PipedLines:
    """The lines of standard input, where it is no terminal."""

    def __init__(self) -> None:
        self._number = 0

    def read(self) -> str:
        """Return the next line.

        Raises:
            EOFError: If there is none.
            ValueError: If it is not UTF-8 text; the next call goes on after it.
        """
        line = sys.stdin.buffer.readline() if sys.stdin else b""
        if not line:
            raise EOFError
        self._number += 1
        return decode(line, f"Line {self._number:,} of standard input")


class TypedLines:
    """Lines from a terminal, with an editor: several lines, history, pastes of any length.

    Args:
        history (History): The lines of earlier times.
    """

    def __init__(self, history: History):
        keys = KeyBindings()
        keys.add("enter")(_accept)
        keys.add("escape", "enter")(_new_line)
        keys.add(Keys.BracketedPaste)(self._insert)
        self._session: PromptSession[str] = PromptSession(
            # Without a style its space is not sent, and a script could not wait for it.
            [("ansidefault", ">>> ")],
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else "... ",
            history=history,
            key_bindings=keys,
            enable_suspend=True,
        )

    def read(self) -> str:
        """Return the next line, or several that were written as one.

        Raises:
            EOFError: At Ctrl-D.
            KeyboardInterrupt: At Ctrl-C.
        """
        return self._session.prompt()

    def _insert(self, event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        if is_dumb_terminal():  # there only the last character is shown
            self._session.output.write(text[:-1])
        event.current_buffer.insert_text(text)


@contextmanager
def open_lines(history: Path | None = None) -> Iterator[PipedLines | TypedLines]:
    """Take lines from standard input until the context ends.

    A terminal cuts what is typed while nobody reads it at 4,095 characters a line
    (1,024 on a Mac). In the context it does not, and does not show it before it is
    asked for.

    Args:
        history (Path, optional): The file for the lines of other times; where it
          can't be written, lines are remembered until the end. Default: beside what
          mlx-dsa tune has measured.

    Yields:
        PipedLines or TypedLines: :meth:`read` returns the next line.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield PipedLines()
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    held = termios.tcgetattr(terminal)
    held[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal, termios.TCSANOW, held)
    try:
        _drop_what_was_cut(terminal)
        output: Any = create_output(always_prefer_tty=True)
        # Where the cursor is, a slow terminal would tell the model.
        output.enable_cpr = False
        with create_app_session(_Keyboard(sys.stdin), output):
            yield TypedLines(_open_history(history or crossover_file().with_name("history")))
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


class _Keyboard(Vt100Input):
    """A terminal's keys, with a paste as one key: one by one 100,000 take minutes."""

    def read_keys(self) -> list[KeyPress]:
        keys = new = super().read_keys()
        while len(new) > _PASTED and select.select([self.fileno()], [], [], _PAUSE)[0]:
            new = super().read_keys()
            keys += new
        return list(_join_text(keys)) if len(keys) > 1 else keys


def _join_text(keys: list[KeyPress]) -> Iterator[KeyPress]:
    text = ""
    for key in keys:
        # A tab, typed alone, would complete; in a paste it is text.
        if len(key.key) == 1 or key.key == Keys.Tab:
            text += key.data
            continue
        if text:
            yield KeyPress(Keys.BracketedPaste, text)
            text = ""
        yield key
    if text:
        yield KeyPress(Keys.BracketedPaste, text)


class _LineHistory(FileHistory):
    """A file that may become full or go away: what was typed counts, not this."""

    def store_string(self, string: str) -> None:
        if len(string) <= _LONGEST_KEPT:
            with suppress(OSError):
                super().store_string(string)


def _open_history(file: Path) -> History:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # For the user alone to read, as a shell's.
        os.close(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _LineHistory(file)


def _drop_what_was_cut(terminal: int) -> None:
    """Drop what was typed before anything read it, if the terminal had no room for all."""
    waiting = int.from_bytes(ioctl(terminal, termios.FIONREAD, bytes(4)), sys.byteorder)
    if waiting >= (1024 if sys.platform == "darwin" else 4095):
        termios.tcflush(terminal, termios.TCIFLUSH)
        click.echo(
            "What was typed before the chat began was too long for the terminal and is "
            "dropped. Type or paste it again.",
            err=True,
        )


def _accept(event: KeyPressEvent) -> None:
    event.current_buffer.validate_and_handle()


def _new_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")
