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
from .stats import Report, measure

_PLACE = "THE-ANSWER-STOOD-HERE"


class _PrefillStopped(Exception):
    pass


class Conversation:
    """Ask one question after another; the model reads each text once.

    Args:
        model (nn.Module): A model, patched or not.
        tokenizer (TokenizerWrapper): Its tokenizer, with a chat template.
        system (str, optional): A system message. Default: ``None``.
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
        max_tokens: int = 512,
        sampler: Callable[[mx.array], mx.array] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        begin: Callable[[], list[Any]] | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.stopped = stopped
        self.progress = progress
        self.begin = begin
        self.report: Report | None = None
        self.reset()

    def reset(self):
        """Forget everything that was said; a document to begin from stays."""
        self.cache = self.begin() if self.begin else make_prompt_cache(self.model)
        self._has_document = self.begin is not None
        self.started = False
        self._last_token: int | None = None

    def read(self, document: str):
        """Read a document to the end, before any question about it.

        Args:
            document (str): The text; it begins the first message.

        Raises:
            ValueError: If the text is empty, or there is no chat template.
        """
        check_prompt(document)
        self._check_template()
        system = {"role": "system", "content": self.system}
        user = {"role": "user", "content": f"{document.strip()}\n\n{_PLACE}"}
        text = self._render([system, user] if self.system else [user])
        prompt = mx.array(self._encode(text.partition(_PLACE)[0]))
        # No token is generated: the last one of the text ends the prompt.
        steps = generate_step(
            prompt,
            self.model,
            max_tokens=0,
            prompt_cache=self.cache,
            prefill_step_size=chunk_size(),
            prompt_progress_callback=self.progress,
        )
        for _ in steps:
            pass
        self._has_document = True

    def ask(self, message: str) -> Iterator[str]:
        """Stream the answer to a message.

        Args:
            message (str): What the user says.

        Yields:
            str: Pieces of the answer. Afterwards ``report`` holds its figures.

        Raises:
            ValueError: If the message is empty, or there is no chat template.
        """
        check_prompt(message)
        self._check_template()
        yield from self._stream(self._turn(message))

    def complete(self, text: str) -> Iterator[str]:
        """Stream the continuation of a text, without the chat template.

        Args:
            text (str): The text.

        Yields:
            str: Pieces of the continuation. Afterwards ``report`` holds its
            figures.

        Raises:
            ValueError: If the text is empty.
        """
        check_prompt(text)
        yield from self._stream(self.tokenizer.encode(text))

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        self.started, self._last_token = True, None
        start, first, response = time.perf_counter(), None, None

        def on_chunk(done: int, total: int):
            self.progress(done, total)
            # Between two chunks every layer has seen the same tokens.
            if done < total and self.stopped():
                raise _PrefillStopped

        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                max_tokens=self.max_tokens,
                sampler=self.sampler,
                prompt_cache=self.cache,
                prefill_step_size=chunk_size(),
                prompt_progress_callback=on_chunk,
            ):
                first = first or time.perf_counter() - start
                # mlx-lm feeds a token before it yields it: the cache holds this one.
                self._last_token = response.token
                yield response.text
                if self.stopped():
                    break
        except _PrefillStopped:
            pass
        self.report = measure(self.cache, response, first)

    def _turn(self, message: str) -> list[int]:
        user = {"role": "user", "content": message}
        if not self.started and self._has_document:
            user = {"role": "user", "content": _PLACE + message}
            return self._encode(self._render([user]).partition(_PLACE)[2])
        if not self.started:
            system = {"role": "system", "content": self.system}
            text = self._render([system, user] if self.system else [user])
            return self._encode(text)
        # What the template puts after an answer: its end mark, then the new turn.
        earlier = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _PLACE},
        ]
        tokens = self._encode(self._render([*earlier, user]).partition(_PLACE)[2])
        return tokens[1:] if tokens[0] == self._last_token else tokens

    def _check_template(self):
        if not self.tokenizer.has_chat_template:
            raise ValueError(
                "[chat] this model has no chat template. Use: mlx-dsa generate --raw"
            )

    def _render(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def check_prompt(text: str):
    """Refuse a prompt without any text."""
    if not text.strip():
        raise ValueError("The prompt must not be empty.")
