"""A request, from when it is admitted until its last token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationArguments, GenerationContext, Response


@dataclass
class Request(CompletionRequest):
    """What is asked: mlx-lm's, and what a server of documents needs besides.

    Args:
        document (str, optional): A document that the messages are about.
        tokens (list of int, optional): A prompt that is tokens already.
        segments (list, optional): Its parts, where they are known: the state of the caches is
          kept at the end of each but the last.
        segment_types (list of str, optional): What each part is.
    """

    document: str | None = None
    tokens: list[int] | None = None
    segments: list[list[int]] | None = None
    segment_types: list[str] | None = None


@dataclass
class Context(GenerationContext):
    """What mlx-lm's handler reads of a request, and the figures of its answer."""

    stats: dict[str, Any] = field(default_factory=dict)


class Extra(Response):
    """The end of an answer whose last token has been told: it counts no token."""


class Ticket:
    """A request in the queue or in a batch, as its two threads see it.

    What the generation thread has to say comes out of :attr:`said`: the :class:`Context`,
    pairs of tokens read and to read, mlx-lm's ``Response`` for each token, ``None`` at the end,
    or an exception.

    Args:
        request (CompletionRequest): What is asked.
        args (GenerationArguments): How it is answered.
        prompt (list of int): All tokens of the prompt.
        segments (list): Its parts.
        types (list of str): What each part is.
        state (str): Where the answer begins: ``"normal"`` or ``"reasoning"``.
        stops (tuple): Stop sequences and the machine that takes them out of the text.
    """

    def __init__(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        prompt: list[int],
        segments: list[list[int]],
        types: list[str],
        state: str,
        stops: tuple[Any, Any],
    ):
        self.request = request
        self.args = args
        self.prompt = prompt
        self.segments = segments
        self.types = types
        self.state = state
        self.stop_sequences, self.text_machine = stops
        self.said: Queue[Any] = Queue()
        self.asked_at = time.perf_counter()
        self.is_cancelled = False

    def put(self, item: Any) -> None:
        """Say something to the thread that waits."""
        self.said.put(item)

    def cancel(self) -> None:
        """Free what the request holds, wherever it is; nothing happens if it is done."""
        self.is_cancelled = True
