"""An answer as OpenAI's clients take it, made by mlx-lm's handler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

from mlx_lm.server import Response
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer

from .errors import ApiError, Gone
from .ticket import Context, Extra, Ticket

_POLL_SECONDS = 0.25
_TELL_SECONDS = 5.0


class Answer:
    """What the generation thread says of a ticket, for mlx-lm's ``handle_completion``.

    It stands where that looks for a ``ResponseGenerator``.

    Args:
        ticket (Ticket): The request.
        context (Context): What the thread said first.
        pieces (iterator): What it says then.
    """

    def __init__(self, ticket: Ticket, context: Context, pieces: Iterator[Response]):
        self._ticket = ticket
        self.context = context
        self._pieces = pieces
        self.n_tokens = 0
        self._told: list[dict[str, Any]] = []

    def generate(self, *_arguments: Any, **_options: Any) -> tuple[Context, Iterator[Response]]:
        """Return the context and the tokens."""
        return self.context, self._tokens()

    def _tokens(self) -> Iterator[Response]:
        for piece in self._pieces:
            if not isinstance(piece, Extra):
                self.n_tokens += 1
                if self._ticket.args.logprobs and piece.finish_reason != "stop":
                    self._told.append({"id": piece.token, "logprob": piece.logprob, "top": piece.top_tokens})
            yield piece

    def take_logprobs(self) -> list[dict[str, Any]]:
        """Return the log-probabilities of the tokens since the last call."""
        told, self._told = self._told, []
        return told


def listen(ticket: Ticket, await_said: Callable[[float], Any], has_gone: Callable[[], bool], tell: Any) -> Iterator:
    """Yield what is said of a ticket, while its client is there.

    Args:
        ticket (Ticket): The request.
        await_said (callable): Takes seconds; returns what is said next, or raises ``Empty``.
        has_gone (callable): Whether the client has gone.
        tell (callable): Takes tokens read and to read, or nothing while the request waits.

    Yields:
        The context, then each token.

    Raises:
        Gone: If the client has closed its connection.
        Exception: What the generation thread says.
    """
    looked = told = time.monotonic()
    while True:
        try:
            item = await_said(_POLL_SECONDS)
        except Empty:
            item = ...
        now = time.monotonic()
        if now - looked >= _POLL_SECONDS:
            looked = now
            if has_gone():
                raise Gone
        if item is ...:
            if now - told >= _TELL_SECONDS:
                told = now
                tell()
            continue
        told = now
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        if isinstance(item, tuple):
            tell(*item)
        else:
            yield item


def checked_parser(parser: Any) -> Any:
    """Return a parser of tool calls whose only failure is a ``ValueError``, of which mlx-lm's handler knows."""
    if parser is None:
        return None

    def parse(*arguments: Any) -> Any:
        try:
            calls = parser(*arguments)
            for call in calls if isinstance(calls, list) else [calls]:
                json.dumps(call["arguments"])
                call["name"] + ""
            return calls
        except Exception as error:
            raise ValueError(type(error).__name__) from None

    return parse


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        token (int): The token.
    """
    if isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer):
        known = _byte_decoder()
        text = tokenizer.convert_ids_to_tokens(token) or ""
        if all(char in known for char in text):
            return bytes(known[char] for char in text)
        return text.encode()
    return tokenizer.decode([token]).encode()


def _byte_decoder() -> dict[str, int]:
    """Return the byte of each character that stands for one in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(b): b for b in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def chat_logprobs(tokenizer: Any, told: list[dict[str, Any]]) -> dict[str, Any]:
    """Return log-probabilities as answers of a chat have them.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        told (list): Of :meth:`Answer.take_logprobs`.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for one in told:
        top = [entry(other["id"], other["logprob"]) for other in one["top"]]
        content.append({**entry(one["id"], one["logprob"]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Any, told: list[dict[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Return log-probabilities as completions have them.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        told (list): Of :meth:`Answer.take_logprobs`.
        offset (int): Characters before the first. Default: ``0``.
    """
    made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in told:
        text = token_bytes(tokenizer, one["id"]).decode("utf-8", "replace")
        made["tokens"].append(text)
        made["token_logprobs"].append(_finite(one["logprob"]))
        names = {token_bytes(tokenizer, o["id"]).decode("utf-8", "replace"): o["logprob"] for o in one["top"]}
        made["top_logprobs"].append({name: _finite(logprob) for name, logprob in names.items()})
        made["text_offset"].append(offset)
        offset += len(text)
    return made


def _finite(logprob: float) -> float:
    """Return a number that JSON has: OpenAI's clients take -9999 for what can't be."""
    return max(logprob, -9999.0) if logprob == logprob else -9999.0


def error_event(error: Exception) -> bytes:
    """Return an error as the last event of a stream."""
    told = error if isinstance(error, ApiError) else ApiError(500, "The server failed. Ask again.")
    return f"data: {json.dumps(told.body())}\n\n".encode()
