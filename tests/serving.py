"""A server of the bundled model in this process, and a plain client of it."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

from mlx_dsa import load_preset, patch_sparse_generate
from mlx_dsa.serve import ServeOptions, Server
from mlx_dsa.serve.provider import Provider

FACTS = "The password of the {} is {}. "


@cache
def tiny(**settings):
    return load_preset("tiny", **settings)


@contextmanager
def serving(dense=True, provider=None, prompt_cache=None, config=None, **options):
    """Serve until the context ends; dense unless told otherwise, which is batched."""
    options = ServeOptions(port=0, **options)
    if provider is None:
        preset = tiny()
        settings = {**vars(preset.config), **(config or {})}
        patch = None if dense else patch_sparse_generate(preset.model, preset.indexers, **settings)
        provider = Provider(preset.model, preset.tokenizer, "tiny", options, patch)
    server = Server(provider, options, prompt_cache)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        assert not [t for t in threading.enumerate() if t is server.generation._generation_thread]


class Client:
    """Ask a server over one connection."""

    def __init__(self, server, key=None, timeout=60):
        self.connection = http.client.HTTPConnection(*server.address, timeout=timeout)
        self.headers = {"Content-Type": "application/json"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"

    def send(self, method, path, body=None, headers=None):
        """Return status, headers and the body, parsed if it is JSON."""
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        self.connection.request(method, path, raw, {**self.headers, **(headers or {})})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.headers.get_content_type() == "application/json" and text:
            text = json.loads(text)
        return answer.status, answer.headers, text

    def get(self, path, **options):
        return self.send("GET", path, **options)

    def chat(self, content, path="/v1/chat/completions", **body):
        """Return the answer to a message, or to messages; it must be one."""
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        status, _, told = self.send("POST", path, {"messages": messages, **body})
        assert status == 200, told
        return told

    def complete(self, prompt, **body):
        status, _, told = self.send("POST", "/v1/completions", {"prompt": prompt, **body})
        assert status == 200, told
        return told

    def events(self, body, path="/v1/chat/completions"):
        """Yield what a stream tells: parsed data, comments as text, None for the end."""
        raw = json.dumps({**body, "stream": True}).encode()
        self.connection.request("POST", path, raw, self.headers)
        answer = self.connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.headers.get_content_type() == "text/event-stream"
        for line in answer:
            line = line.decode().rstrip("\n")
            if line.startswith("data: "):
                yield None if line == "data: [DONE]" else json.loads(line[6:])
            elif line:
                yield line

    def stream(self, content, **body):
        """Return the data of a stream that ends as it should."""
        told = list(self.events({"messages": [{"role": "user", "content": content}], **body}))
        assert told[-1] is None
        return [event for event in told[:-1] if isinstance(event, dict)]

    def close(self):
        self.connection.close()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def user(content):
    return [{"role": "user", "content": content}]


def long_text(n, word="harbour"):
    """Return some text of about n tokens."""
    return "".join(f"On day {i} the {word} was calm and nobody came. " for i in range(n // 13))


def raw_request(server, data, timeout=10, end=False):
    """Send bytes; return what comes back until the connection closes."""
    with socket.create_connection(server.address, timeout=timeout) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return got


def gauge(server, name):
    return server.generation.gauges.get(name, 0)


def wait_until(condition, seconds=15):
    """Wait for something; fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def idle(server):
    """Whether nothing waits and no row is held."""
    generation = server.generation
    return not generation._waiting and not generation._in_flight and not len(generation._rows)
