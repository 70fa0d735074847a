"""One answer while it is read and written, in the generation thread."""

from __future__ import annotations

import time
from typing import Any, cast

import mlx.core as mx
from mlx_lm.server import Response
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

from .errors import ApiError
from .metrics import Metrics
from .provider import dense_bytes
from .sampling import StopText, top_tokens
from .ticket import Context, Extra, Ticket

# Tokens that may wait for a client to take them.
_MOST_WAITING = 4096


class Row:
    """A ticket that is being answered.

    Args:
        ticket (Ticket): What is asked.
        tokenizer (TokenizerWrapper): Of the model.
        metrics (Metrics): Where its tokens are counted.
        n_cached (int): Tokens of the prompt that were known already.
        token_nbytes (int): Bytes of a token in a dense cache.
    """

    def __init__(self, ticket: Ticket, tokenizer: Any, metrics: Metrics, n_cached: int, token_nbytes: int):
        self.ticket = ticket
        self.n_cached = n_cached
        self.is_reading = True
        self.types = cut_types(ticket, n_cached)
        self._metrics = metrics
        self._token_nbytes = token_nbytes
        self._detokenizer = tokenizer.detokenizer
        if ticket.request.request_type == "text":
            keep_first_space(self._detokenizer)
        self._stop_text = StopText(ticket.args.stop_words)
        self._began = time.perf_counter()
        self._first_at: float | None = None
        self._last_at = self._began
        self._n_read = self._n_tokens = 0
        self.context = Context(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=ticket.text_machine,
            initial_state=ticket.state,
            prompt=ticket.prompt,
            prompt_cache_count=n_cached,
        )
        metrics.count("tokens_prompt", len(ticket.prompt))
        metrics.count("tokens_cached", n_cached)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.ticket.is_cancelled or self.context._should_stop

    def read(self, done: int, total: int) -> None:
        """Tell how many tokens of what is left of the prompt have been read."""
        self._metrics.count("tokens_read", max(0, done - self._n_read))
        self._n_read = done
        self.ticket.put((done, total))

    def write(self, token: int, logprobs: mx.array, finish: str | None) -> str | None:
        """Tell a token.

        Args:
            token (int): The token.
            logprobs (mx.array): The log-probabilities of all.
            finish (str, optional): ``"stop"`` or ``"length"`` if it is the last.

        Returns:
            str, optional: As ``finish``, also where a stop text ends the answer here. The end
            is told by :meth:`end`.
        """
        self._last_at = time.perf_counter()
        if self._first_at is None:
            self.is_reading = False
            self._first_at = self._last_at
            self._metrics.first_token(self._last_at - self.ticket.asked_at)
        self._n_tokens += 1
        self._metrics.count("tokens_generated")
        if finish != "stop":
            self._detokenizer.add_token(token)
        if finish is not None:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        wanted = self.ticket.args.logprobs
        logprob = float(cast(float, logprobs[token].item())) if wanted else 0.0
        top: Any = top_tokens(logprobs, self.ticket.args.top_logprobs) if wanted else ()
        end = None if finish == "stop" else self._stop_text.end_in(text)
        if end is None:
            self._answer = Response(text, token, logprob, finish, top)
            if finish is None:
                self.ticket.put(self._answer)
                self._check_taken()
            return finish
        self.ticket.put(Response(text[:end], token, logprob, None, top))
        self._answer = Extra("", token, 0.0, "stop", cast(Any, ()))
        return "stop"

    def _check_taken(self) -> None:
        # A client that does not read holds up its own connection alone, but what waits for it is memory.
        if self.ticket.said.qsize() > _MOST_WAITING:
            self.ticket.put(ApiError(503, "The answer was not taken for too long. Ask again, and read it as it comes."))
            self.ticket.cancel()

    def end(self, caches: list[Any] | None, n_seen: int) -> None:
        """Tell that the answer is complete.

        Args:
            caches (list, optional): Its caches, if they are known.
            n_seen (int): Tokens that they have seen.
        """
        self.context.stats.update(self._figures(caches, n_seen))
        self.ticket.put(self._answer)
        self.ticket.put(None)

    def _figures(self, caches: list[Any] | None, n_seen: int) -> dict[str, Any]:
        first = self._first_at or self._last_at
        reading, writing = first - self._began, self._last_at - first
        figures: dict[str, Any] = {
            "tokens_seen": n_seen,
            "dense_kv_bytes": dense_bytes(self._token_nbytes, n_seen) or None,
            "prompt_tps": round(self._n_read / reading, 2) if reading > 0 else None,
            "generation_tps": round((self._n_tokens - 1) / writing, 2) if writing > 0 else None,
            "first_token_s": round(first - self.ticket.asked_at, 4),
        }
        if caches is not None:
            figures["entries_kept"] = max(map(entries_of, caches), default=0)
            figures["kv_bytes"] = sum(cache.nbytes for cache in caches)
        return {name: value for name, value in figures.items() if value is not None}


def keep_first_space(detokenizer: Any) -> None:
    """Let what continues a text begin with a space: mlx-lm takes the first one of any answer away."""
    if isinstance(detokenizer, (BPEStreamingDetokenizer, SPMStreamingDetokenizer)):
        detokenizer.text, detokenizer.offset = " ", 1


def entries_of(cache: Any) -> int:
    """Return the entries that a layer's cache of one row keeps."""
    return int(cache.size() or getattr(cache, "offset", 0) or 0) if hasattr(cache, "size") else 0


def cut_segments(ticket: Ticket, n_cached: int) -> list[list[int]]:
    """Return the parts of a prompt from a token on."""
    parts, begin = [], 0
    for segment in ticket.segments:
        rest = segment[max(0, n_cached - begin) :]
        begin += len(segment)
        if rest:
            parts.append(rest)
    return parts


def cut_types(ticket: Ticket, n_cached: int) -> list[str]:
    """Return what :func:`cut_segments`' parts are."""
    kinds, begin = [], 0
    for segment, kind in zip(ticket.segments, ticket.types):
        begin += len(segment)
        if segment and begin > n_cached:
            kinds.append(kind)
    return kinds
