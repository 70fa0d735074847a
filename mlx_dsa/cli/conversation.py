"""A chat whose cache stays between turns, driven by mlx_lm.stream_generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..chunks import chunk_size
from ..patch import patch_of
from ..reach import reach_of
from ..template import ChatTemplate
from ..unfinished import UnfinishedReading
from .documents import check_text
from .stats import Report, measure

# Tokens of a question for which what is cold is brought back one by one, and how many at once.
_QUESTION, _PIECE = 512, 16


class _PrefillStopped(Exception):
    pass


class Conversation:
    """Ask one question after another; the model reads each text once.

    Args:
        model (nn.Module): A model, patched or not.
        tokenizer (TokenizerWrapper): Its tokenizer, with a chat template.
        system (str, optional): A system message. Default: ``None``.
        think (bool, optional): Whether the model is to think before it answers.
          Default: ``None``, as its chat template does by itself.
        max_tokens (int): Tokens an answer may have. Default: ``512``.
        sampler (Callable, optional): Log-probabilities to a token.
          Default: ``None``, the most likely one.
        stopped (Callable): Asked after every chunk of the prompt and every
          token; ``True`` ends the answer. Default: never.
        progress (Callable): Called with the tokens of the prompt that were read
          and their number. Default: nothing.
        begin (Callable, optional): Makes caches that have read a document, as
          :meth:`read` leaves them, to begin from. Default: ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        system: str | None = None,
        think: bool | None = None,
        max_tokens: int = 512,
        sampler: Callable[[mx.array], mx.array] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        begin: Callable[[], list[Any]] | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, system=system, think=think)
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.stopped = stopped
        self.progress = progress
        self.begin = begin
        self.report: Report | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said; a document to begin from stays."""
        self.cache = self.begin() if self.begin else make_prompt_cache(self.model)
        self._has_document = self.begin is not None
        self.started = False
        self._answer: list[int] = []  # of the last turn, as the cache has seen it
        self._ended = False  # whether the model itself ended that answer
        self._unread: list[int] = []  # of a prompt that was stopped

    def read(self, document: str, part: UnfinishedReading | None = None) -> str:
        """Read a document to the end, before any question about it.

        Args:
            document (str): The text; it begins the first message.
            part (UnfinishedReading, optional): Where what is read is kept on the way, and
              may have been kept by an earlier run, from which this one goes on.
              Default: ``None``.

        Returns:
            str: What was read: the document as the chat template renders it.

        Raises:
            ValueError: If the text is empty or longer than the model's positions, there
              is no chat template, or the part is of another reading.
            KeyboardInterrupt: If ``stopped`` says so; a part then has all that was read.
        """
        check_prompt(document)
        self.template.check()
        text, done = self.template.document(document), 0
        left = part.load() if part is not None else None
        if left is not None:  # some templates tell the date: it stays the first run's
            text = left.text
        prompt = self.template.encode(text)
        reach_of(self.model).check_prompt(self.cache, len(prompt))
        if part is not None:
            part.begin(text, prompt)
        if left is not None:
            self.cache, _, done = left

        def on_chunk(read: int, total: int) -> None:
            self.progress(done + read, done + total)
            if part is None or not 0 < read < total:
                return
            stopped = self.stopped()
            part.keep(self.cache, done + read, now=stopped)
            if stopped:
                raise KeyboardInterrupt

        # No token is generated: the last one of the text ends the prompt.
        steps = generate_step(
            mx.array(prompt[done:]),
            self.model,
            max_tokens=0,
            prompt_cache=self.cache,
            prefill_step_size=chunk_size(),
            prompt_progress_callback=on_chunk,
        )
        for _ in steps:
            pass
        self._has_document = True
        return text

    def check(self, message: str) -> None:
        """Refuse a message as :meth:`ask` would now, without asking it.

        Args:
            message (str): What the user would say.

        Raises:
            ValueError: As in :meth:`ask`.
        """
        self._prepare(message)

    def ask(self, message: str) -> Iterator[str]:
        """Stream the answer to a message.

        Where the last prompt was stopped before its end, its rest is read first.

        Args:
            message (str): What the user says.

        Returns:
            iterator: Pieces of the answer. Afterwards ``report`` holds its figures.

        Raises:
            ValueError: At once, and nothing has been read: if the message is empty or
              not text, the model has no positions for it, or there is no chat
              template for it.
        """
        return self._stream(self._prepare(message))

    def complete(self, text: str) -> Iterator[str]:
        """Stream the continuation of a text, without the chat template.

        Args:
            text (str): The text.

        Returns:
            iterator: Pieces of the continuation. Afterwards ``report`` holds its
            figures.

        Raises:
            ValueError: If the text is empty, not text, or longer than the model's
              positions.
        """
        check_prompt(text)
        prompt = self.tokenizer.encode(text)
        reach_of(self.model).check_prompt(self.cache, len(prompt))
        return self._stream(prompt)

    def _prepare(self, message: str) -> list[int]:
        check_prompt(message)
        self.template.check()
        prompt = self._unread + self._turn(message)
        reach_of(self.model).check_prompt(self.cache, len(prompt))
        return prompt

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        self.started = True
        self._answer, self._ended, self._unread = [], False, []
        max_tokens = reach_of(self.model).room(self.cache, len(prompt), self.max_tokens)
        start, first, response = time.perf_counter(), None, None

        def on_chunk(done: int, total: int) -> None:
            self.progress(done, total)
            # Between two chunks every layer has seen the same tokens.
            if done < total and self.stopped():
                self._unread = prompt[done:]
                raise _PrefillStopped

        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                self._recalling(prompt),
                max_tokens=max_tokens,
                sampler=self.sampler,
                prompt_cache=self.cache,
                prefill_step_size=chunk_size(),
                prompt_progress_callback=on_chunk,
            ):
                first = first or time.perf_counter() - start
                # mlx-lm feeds a token before it yields it: the cache holds this one.
                self._answer.append(response.token)
                yield response.text
                if self.stopped():
                    break
        except _PrefillStopped:
            pass
        reason = response and response.finish_reason
        self._ended = reason == "stop"
        cut = None
        if reason == "length":
            cut = "positions" if max_tokens < self.max_tokens else "max_tokens"
        report = measure(self.cache, response, first, cut, len(self._unread))
        n_read = len(prompt) - len(self._unread)
        if response and first and n_read != report.prompt_tokens:
            report = report._replace(prompt_tokens=n_read, prompt_tps=n_read / first)
        self.report = report

    def _recalling(self, prompt: list[int]) -> list[int]:
        """Read a short prompt with what is cold brought back for each of its tokens; return
        what is left to read: its last token, or all where nothing is cold.

        A document is longer, and reads what is at hand.
        """
        patch = patch_of(self.model)
        if patch is None or len(prompt) > _QUESTION or not patch.misses_cold(self.cache):
            return prompt
        before_last = len(prompt) - 1
        with patch.decoding(self.cache):
            for start in range(0, before_last, _PIECE):
                if start and self.stopped():
                    self._unread = prompt[start:]
                    raise _PrefillStopped
                piece = prompt[start : min(start + _PIECE, before_last)]
                mx.eval(self.model(mx.array([piece]), cache=self.cache))
                self.progress(start + len(piece), len(prompt))
        return prompt[before_last:]

    def _turn(self, message: str) -> list[int]:
        if not self.started and self._has_document:
            return self.template.after_document(message)
        if not self.started:
            return self.template.first(message)
        tokens = self.template.after_answer(message)
        if self._ended:
            return tokens[1:] if tokens[:1] == self._answer[-1:] else tokens
        if self.template.thinks(self._answer):
            return self.template.end_of_thoughts() + tokens
        return tokens


def check_prompt(text: str) -> None:
    """Refuse a prompt without any text, or with what is no text."""
    if not text.strip():
        raise ValueError("The prompt must not be empty.")
    check_text(text, "The prompt")
