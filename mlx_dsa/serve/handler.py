"""What is asked and answered at each address."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, cast

from mlx_lm.server import CompletionRequest

from . import pages
from .answer import Answer, chat_logprobs, checked_parser, listen, text_logprobs
from .bodies import Asked, check_model, read
from .connection import Connection
from .ticket import Request, Ticket

_COMPLETIONS = {"/chat/completions": "chat", "/completions": "text"}


class Handler(Connection):
    """Answer at the addresses of OpenAI's API; mlx-lm's handler makes the answers."""

    def _find(self, path: str) -> tuple[str, dict[str, Any]]:
        short = path.removeprefix("/v1")
        if short in _COMPLETIONS:
            kind = _COMPLETIONS[short]
            return f"/v1{short}", {"POST": (lambda handler, rest: handler._complete(kind), "")}
        if short == "/models" or short.startswith("/models/"):
            return "/v1/models", {"GET": (Handler._send_models, short.removeprefix("/models").removeprefix("/"))}
        if path == "/health":
            return path, {"GET": (Handler._send_health, "")}
        if path == "/metrics":
            return path, {"GET": (Handler._send_metrics, "")}
        return self.app.find(path)

    def _send_page(self, path: str) -> bool:
        found = pages.static_file(path) if self.command in ("GET", "HEAD") else None
        if found is not None:
            self.endpoint = "page"
            body, content_type = found
            self.send_bytes(body, content_type, headers=pages.HEADERS)
        return found is not None

    def _send_health(self, _rest: str) -> None:
        generation = self.app.generation
        if generation.is_draining or not generation.is_healthy:
            self.send_json({"status": "stopping" if generation.is_draining else "failed"}, 503)
        else:
            self.send_json({"status": "ok"})

    def _send_metrics(self, _rest: str) -> None:
        text = self.app.metrics.text(self.app.generation.gauges)
        self.send_bytes(text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _send_models(self, name: str) -> None:
        model = {"id": self.app.name, "object": "model", "created": self.app.created, "owned_by": "mlx-dsa"}
        if name:
            check_model(name, self.app.name)
            self.send_json(model)
        else:
            self.send_json({"object": "list", "data": [model]})

    # Answers.

    def _complete(self, kind: str) -> None:
        app = self.app
        asked = read(kind, self.read_json(), app.options, app.name, app.provider.vocab_size)
        request = Request(
            cast(Any, asked.kind),
            asked.prompt,
            asked.messages,
            asked.tools,
            None,
            document=asked.document,
            tokens=asked.tokens,
        )
        self._adopt(asked)
        ticket = app.generation.submit(request, asked.arguments)
        try:
            self._answer_with(ticket, request)
        finally:
            app.generation.done(ticket)

    def _adopt(self, asked: Asked) -> None:
        """Set what mlx-lm's handler reads."""
        args = asked.arguments
        self._asked = asked
        self.stream = asked.stream
        self.stream_options = {"include_usage": asked.include_usage}
        self.requested_model = self.app.name
        self.requested_draft_model = self.adapter = self.num_draft_tokens = None
        for part in (args.sampling, args.logits):
            vars(self).update(vars(part))
        self.max_tokens, self.seed = args.max_tokens, args.seed
        self.logprobs, self.top_logprobs = args.logprobs, args.top_logprobs
        self.chat_template_kwargs = args.chat_template_kwargs
        is_chat = asked.kind == "chat"
        self.created = int(time.time())
        self.request_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4()}"
        self.object_type = "text_completion" if not is_chat else "chat.completion"
        if is_chat and asked.stream:
            self.object_type += ".chunk"

    def _answer_with(self, ticket: Ticket, request: CompletionRequest) -> None:
        generation, self._n_told, self._called = self.app.generation, 0, False
        self._ticket = ticket
        pieces: Iterator[Any] = listen(
            ticket, lambda seconds: generation.next_said(ticket, seconds), self.has_gone, self._tell_progress
        )
        context = next(pieces)
        context.tool_parser = checked_parser(context.tool_parser)
        self._answer = Answer(ticket, context, pieces)
        generator, self.response_generator = self.response_generator, cast(Any, self._answer)
        try:
            self.handle_completion(request, ticket.args.stop_words)
        finally:
            self.response_generator = generator
        if self.stream:
            self.end_events()

    def _tell_progress(self, done: int | None = None, total: int = 0) -> None:
        """Tell how much of a prompt has been read, or that the request waits."""
        assert self._asked is not None
        if not self.stream:
            return
        self.begin_events()
        if self._asked.return_progress and done is not None:
            cached = max(0, len(self._ticket.prompt) - total)
            taken = round((time.perf_counter() - self._ticket.asked_at) * 1000)
            self.send_event(
                {
                    "id": self.request_id,
                    "object": self.object_type,
                    "model": self.requested_model,
                    "created": self.created,
                    "choices": [],
                    "prompt_progress": {
                        "total": cached + total,
                        "cache": cached,
                        "processed": cached + done,
                        "time_ms": taken,
                    },
                }
            )
        elif done is None:
            self.wfile.write(b": waiting\n\n")
        else:
            self.wfile.write(f": read {done} of {total}\n\n".encode())

    def generate_response(self, text: str, finish_reason: str | None, *counts: Any, **parts: Any) -> dict:
        """Return an answer, or a piece of one: mlx-lm's method, and what it leaves out."""
        answer = self._answer
        assert answer is not None
        parts.pop("token_logprobs", None), parts.pop("top_tokens", None)
        self._called |= bool(parts.get("tool_calls"))
        if finish_reason == "tool_calls" and not self._called:
            finish_reason = "stop"  # a call that could not be parsed is none
        if len(counts) > 1:
            counts = (counts[0], answer.n_tokens, *counts[2:])
        response: dict = super().generate_response(text, finish_reason, *counts, **parts)  # type: ignore[arg-type]
        choice = response["choices"][0]
        told = answer.take_logprobs()
        choice["logprobs"] = self._logprobs(told) if told else None
        said = choice.get("delta") or choice.get("message") or {}
        if said.get("reasoning"):
            said["reasoning_content"] = said["reasoning"]
        if finish_reason is not None:
            response["mlx_dsa"] = answer.context.stats
        return response

    def completion_usage_response(self, *counts: Any) -> dict:
        """Return the last event of a stream, which tells what it took."""
        answer = self._answer
        assert answer is not None
        response: dict = super().completion_usage_response(counts[0], answer.n_tokens, *counts[2:])
        response["object"] = self.object_type
        response["mlx_dsa"] = answer.context.stats
        return response

    def _logprobs(self, told: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = self.app.provider.tokenizer
        if self.object_type != "text_completion":
            return chat_logprobs(tokenizer, told)
        made = text_logprobs(tokenizer, told, self._n_told)
        self._n_told += sum(map(len, made["tokens"]))
        return made
