"""The one thread that runs the model: a queue in front, a batch of rows, and work between steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any, TypeVar, cast

import mlx.core as mx
from mlx_lm.server import CompletionRequest, GenerationArguments, ResponseGenerator

from .errors import ApiError, bad, overloaded, told_of
from .heap import Heap
from .metrics import Metrics
from .options import ServeOptions
from .provider import Provider
from .rows import Rows
from .segments import plain_segments, prompt_of
from .ticket import Request, Ticket

T = TypeVar("T")
log = logging.getLogger("mlx_dsa.serve")
_ENDED = "The generation thread has ended. Start the server again."
_STOPPING = "The server is stopping. Ask again later."


class Generation(ResponseGenerator):
    """mlx-lm's generator of responses with a loop that outlives what goes wrong in it.

    Requests wait in a queue of its own and become rows as there is room, so that one whose
    client has gone costs nothing, and one that finds its beginning known finds it late.

    Args:
        provider (Provider): The model.
        prompt_cache: What is kept between requests, with mlx-lm's ``LRUPromptCache`` contract.
        options (ServeOptions): How the server is set up.
        metrics (Metrics): Where what happens is counted.
    """

    def __init__(self, provider: Provider, prompt_cache: Any, options: ServeOptions, metrics: Metrics):
        self.options = options
        self.metrics = metrics
        self.is_draining = False
        self.gauges: dict[str, float] = {}
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[tuple[Callable[[], Any], Queue[Any]]] = deque()
        self._wake = threading.Condition()
        self.tokenizing = threading.RLock()
        self.documents: Any = None
        self._heap = Heap()
        self._rows: Rows | None = None
        self._in_flight: set[object] = set()
        self.provider = provider
        super().__init__(cast(Any, provider), prompt_cache)

    # Any thread.

    def submit(self, request: CompletionRequest, args: GenerationArguments) -> Ticket:
        """Put a request in the queue.

        Args:
            request (CompletionRequest): What is asked.
            args (GenerationArguments): How it is answered; its ``max_tokens`` is lowered to what
              the context has room for.

        Returns:
            Ticket: Out of which the answer comes. Who takes it cancels it in the end.

        Raises:
            ApiError: If it is refused.
        """
        self._check_open()
        self._check_queue()
        provider = self.provider
        with self.tokenizing:
            prompt, segments, types, state = self._prompt_of(request, args)
            self._check_context(prompt, args)
            # Stop texts are found in the text: as tokens, what stands before them in a piece would be lost.
            make, key = self._make_state_machine, (provider.model_key, provider.tokenizer)
            stops = make(*key, [])[0], make(*key, args.stop_words)[1]
        ticket = Ticket(request, args, prompt, segments, types, state, stops)
        with self._wake:
            self._check_open()
            self._check_queue()
            self._waiting.append(ticket)
            self._in_flight.add(ticket)
            self._wake.notify()
        return ticket

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        """Ask, and return the context and the answer's tokens: mlx-lm's method of this name."""
        ticket = self.submit(request, generation_args)
        said = self._said(ticket, progress_callback)
        try:
            return next(said), said
        except BaseException:
            self.done(ticket)
            raise

    def _said(self, ticket: Ticket, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
        try:
            while (item := self._await_response(ticket.said)) is not None:
                if isinstance(item, Exception):
                    raise item
                if not isinstance(item, tuple):
                    yield item
                elif progress is not None:
                    progress(*item)
        finally:
            self.done(ticket)

    def next_said(self, ticket: Ticket, seconds: float) -> Any:
        """Return what is said next of a ticket.

        Args:
            ticket (Ticket): From :meth:`submit`.
            seconds (float): How long to wait.

        Raises:
            queue.Empty: If nothing is said so long.
            ApiError: If the thread has ended.
        """
        try:
            return ticket.said.get(timeout=seconds)
        except Empty:
            if not self.generation_available() and ticket.said.empty():
                raise ApiError(500, _ENDED) from None
            raise

    def done(self, ticket: Ticket) -> None:
        """Free what a ticket holds: its answer is complete, or nobody wants it."""
        ticket.cancel()
        with self._wake:
            self._in_flight.discard(ticket)
            self._wake.notify_all()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have :meth:`drain` wait for what is done inside; refuse it with an ``ApiError`` after that."""
        work = object()
        with self._wake:
            self._check_open()
            self._in_flight.add(work)
        try:
            yield
        finally:
            with self._wake:
                self._in_flight.discard(work)
                self._wake.notify_all()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the generation thread, between two steps; return what it does.

        Raises:
            Exception: What the function raises.
            ApiError: If the thread has ended.
        """
        if threading.current_thread() is self._generation_thread:
            return function()
        answer: Queue[Any] = Queue()
        with self._wake:
            self._calls.append((function, answer))
            self._wake.notify()
        value, error = self._await_response(answer)
        if error is not None:
            raise error
        return value

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those that were taken are answered, or some seconds.

        Returns:
            bool: Whether all are answered.
        """
        self.is_draining = True
        with self._wake:
            return self._wake.wait_for(lambda: not self._in_flight or not self.generation_available(), timeout)

    def wait_until_told(self, seconds: float) -> None:
        """Wait until every client has been told what became of its request, for some time at most."""
        with self._wake:
            self._wake.wait_for(lambda: not self._in_flight, seconds)

    def stop_and_join(self) -> None:
        """End the thread; what is in flight gets an error."""
        self.is_draining = True
        super().stop_and_join()

    def _await_response(self, response_queue: Queue) -> Any:
        try:
            return super()._await_response(response_queue)
        except RuntimeError:
            raise ApiError(500, _ENDED) from None

    def _check_open(self) -> None:
        if self.is_draining:
            raise overloaded(_STOPPING, 5)
        if not self.generation_available():
            raise ApiError(500, _ENDED)

    def _check_queue(self) -> None:
        if len(self._waiting) >= self.options.max_queue:
            self.metrics.count("requests_refused")
            raise overloaded(f"As many requests wait as may ({len(self._waiting)}). Ask again later.")

    def _prompt_of(
        self, request: CompletionRequest, args: GenerationArguments
    ) -> tuple[list[int], list[list[int]], list[str], str]:
        try:
            prompt, segments, types, state, *_ = self._tokenize(self.provider.tokenizer, request, args)
        except ApiError:
            raise
        # A chat template is a program that came with the model: it can raise anything.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise bad(f"The model's chat template can't render these messages: {reason}") from None
        if not prompt:
            raise bad("The prompt is empty.")
        return prompt, segments, types, state

    def _tokenize(self, tokenizer: Any, request: CompletionRequest, args: GenerationArguments) -> Any:
        """Return a prompt and its parts, as mlx-lm's method of this name."""
        if isinstance(request, Request) and request.tokens is not None:
            segments = request.segments or [request.tokens]
            types = request.segment_types or ["assistant"] * len(segments)
            return request.tokens, segments, types, "normal", None
        document = getattr(request, "document", None)
        if request.request_type != "chat" or not tokenizer.has_chat_template:
            if document is not None:
                raise bad("Only a chat can ask a document.")
            prompt, _, _, state, vision = super()._tokenize(tokenizer, request, args)
            return prompt, *plain_segments(prompt, self.provider.config), state, vision
        options = args.chat_template_kwargs or {}
        if document is not None:
            if self.documents is None:
                raise ApiError(404, "There is no such document.", "not_found")
            return self.documents.tokenize(document, request.messages, request.tools, options)
        template = {"tools": request.tools, **self.options.template_arguments, **options}
        return prompt_of(tokenizer, request.messages, template, self.provider.config)

    def _check_context(self, prompt: list[int], args: GenerationArguments) -> None:
        n, reach = len(prompt), self.provider.reach
        most = self.options.max_context
        code = "context_length_exceeded"
        if most is not None and n >= most:
            raise bad(f"This server takes prompts of up to {most - 1} tokens but this has {n}. Shorten it.", code)
        try:
            reach.check_prompt([], n)
        except ValueError as error:
            raise bad(str(error).removeprefix("[prompt] "), code) from None
        room = reach.room([], n, args.max_tokens)
        if most is not None:
            room = min(room, most - n)
        if room < 1:
            raise bad(f"The prompt's {n} tokens leave no room for an answer. Shorten it.", code)
        args.max_tokens = min(args.max_tokens, room)

    # The generation thread.

    def _generate(self) -> None:
        self._rows = rows = Rows(self)
        try:
            while not self._stop:
                try:
                    self._round(rows)
                except Exception as error:
                    log.exception("A step failed; its requests are answered with an error.")
                    self.metrics.count("failures")
                    rows.fail(told_of(error))
        finally:
            self._end(rows)

    def _round(self, rows: Rows) -> None:
        self.run_calls()
        rows.drop_cancelled()
        self._admit(rows)
        if rows:
            rows.step()
        self._publish(rows)
        self._heap.note(bool(rows))
        if not rows:
            with self._wake:
                if not self._waiting and not self._calls:
                    self._wake.wait(0.1)

    def run_calls(self) -> None:
        """Run what :meth:`call` was given."""
        while self._calls:
            function, answer = self._calls.popleft()
            try:
                answer.put((function(), None))
            except Exception as error:
                answer.put((None, error))

    def _admit(self, rows: Rows) -> None:
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        self.metrics.count("requests_cancelled", len(gone))
        while self._waiting and rows.has_room(self._waiting[0]):
            with self._wake:
                ticket = self._waiting.popleft()
            try:
                rows.add(ticket)
            except Exception as error:
                log.warning("A request was not begun: %s", type(error).__name__)
                ticket.put(told_of(error))

    def _publish(self, rows: Rows) -> None:
        store = self.prompt_cache
        self.gauges = {
            **rows.gauges(),
            "queue_length": len(self._waiting),
            "snapshots": len(store),
            "snapshot_bytes": store.nbytes,
            "memory_bytes": mx.get_active_memory(),
        }

    def _end(self, rows: Rows) -> None:
        error = overloaded(_STOPPING, 5)
        rows.fail(error)
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
            calls, self._calls = list(self._calls), deque()
            self._wake.notify_all()
        for ticket in waiting:
            ticket.put(error)
        for _, answer in calls:
            answer.put((None, error))
        # In the thread that made them, as mlx-lm does.
        rows.close()
        getattr(self.prompt_cache, "close", lambda: None)()
        del self.prompt_cache
        self.provider.reset()
        # A step begun ahead would still run when Python ends, and take the process down (SIGABRT).
        mx.synchronize()
        if hasattr(mx, "clear_streams"):
            mx.clear_streams()
