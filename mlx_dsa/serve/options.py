"""How a server is set up, and what mlx-lm's own server reads of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """How a server is set up.

    Args:
        host (str): The address to listen at.
        port (int): The port; 0 takes a free one.
        api_key (str, optional): What requests must show; ``None`` asks for nothing.
        allowed_origins (tuple of str): Web pages of other hosts that may ask; ``"*"`` for all.
        max_tokens (int): Tokens of an answer where a request says nothing.
        max_context (int, optional): Tokens of a prompt and its answer; ``None`` for as many as
          the model has positions.
        max_queue (int): Requests that may wait.
        max_body (int): Bytes of a request's body.
        memory_limit (int, optional): Bytes that MLX may hold; ``None`` for no bound.
        snapshot_bytes (int): Bytes of what is kept between requests.
        decode_concurrency (int): Answers that are written at once.
        prompt_concurrency (int): Prompts that are read at once.
        prompt_chunk (int): Tokens of a prompt that are read at once.
        store (str, optional): A folder for what outlives the server.
        temp, top_p, top_k, min_p: The sampling where a request says nothing.
        think (bool, optional): As ``--think``; ``None`` leaves it to the chat template.
        max_connections (int): Connections at once.
        header_seconds, body_seconds, idle_seconds, write_seconds (float): How long a client may
          take to send a request's head and its body, to ask again, and to take what is sent.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_tokens: int = 512
    max_context: int | None = None
    max_queue: int = 256
    max_body: int = 16 << 20
    memory_limit: int | None = None
    snapshot_bytes: int = 2 << 30
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prompt_chunk: int = 2048
    store: str | None = None
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    think: bool | None = None
    max_connections: int = 512
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    idle_seconds: float = 60.0
    write_seconds: float = 60.0

    @property
    def template_arguments(self) -> dict[str, bool]:
        """What the chat template is told in every request."""
        return {} if self.think is None else {"enable_thinking": self.think}

    def arguments(self, model: str) -> argparse.Namespace:
        """Return what mlx-lm's server takes from its command line.

        Args:
            model (str): The name that is served.
        """
        return argparse.Namespace(
            model=model,
            adapter_path=None,
            draft_model=None,
            num_draft_tokens=0,
            allowed_origins=list(self.allowed_origins),
            temp=self.temp,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            chat_template_args=self.template_arguments,
            decode_concurrency=self.decode_concurrency,
            prompt_concurrency=self.prompt_concurrency,
            prefill_step_size=self.prompt_chunk,
            prompt_cache_bytes=self.snapshot_bytes,
            kv_bits=None,
            kv_group_size=64,
            quantized_kv_start=0,
        )
