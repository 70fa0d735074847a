"""Keys, pages of others, and the bounds of a server; what goes wrong in a step; how it ends."""

import json
import socket
import threading
import time

import pytest
from serving import Client, idle, long_text, raw_request, serving, text_of, tiny, user, wait_until

from mlx_dsa.serve.errors import ApiError
from mlx_dsa.serve.snapshots import Snapshots

ASK = {"messages": user("Hi"), "max_tokens": 2}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with serving(max_queue=3, decode_concurrency=2, prompt_concurrency=1, prompt_chunk=128) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "server" in request.fixturenames:
        wait_until(lambda: idle(request.getfixturevalue("server")))


def send_chat(server, **body):
    """Send a chat on a socket of its own and return that."""
    raw = json.dumps({**ASK, **body}).encode()
    connection = socket.create_connection(server.address, timeout=20)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
    return connection


# Keys and origins.


def test_a_key_is_asked_for():
    with serving(api_key="s3cret-ключ") as server:
        for key in (None, "", "wrong", "s3cret", "s3cret-ключ2"):
            client = Client(server, key=key and key.encode().decode("latin-1"))
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/nothing")):
                status, headers, told = client.send(method, path, ASK if method == "POST" else None)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
                assert told["error"]["code"] == "invalid_api_key"
            assert client.get("/health")[0] == 200
        client = Client(server, key="s3cret-ключ".encode().decode("latin-1"))
        assert text_of(client.chat("Hi", max_tokens=2)) and client.get("/metrics")[0] == 200


@pytest.mark.parametrize(
    "headers, status",
    [({}, 200), ({"Origin": "http://{own}"}, 200), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
     ({"Host": "evil.example:80"}, 403), ({"Host": "localhost:1"}, 200), ({"Host": "[::1]:5"}, 200)],
)  # fmt: skip
def test_pages_of_others_may_not_ask(server, headers, status):
    own = "{}:{}".format(*server.address)
    client = Client(server)
    got, answer, _ = client.send("POST", CHAT, ASK, {k: v.format(own=own) for k, v in headers.items()})
    assert got == status and not [name for name in answer if name.lower().startswith("access-control")]


def test_origins_that_are_allowed():
    with serving(allowed_origins=("http://app.example",)) as server:
        client = Client(server)
        status, headers, _ = client.send("OPTIONS", CHAT, headers={"Origin": "http://app.example"})
        assert status == 204 and headers["Access-Control-Allow-Origin"] == "http://app.example"
        assert client.send("POST", CHAT, ASK, {"Origin": "http://app.example"})[0] == 200
        assert client.send("POST", CHAT, ASK, {"Origin": "http://other.example"})[0] == 403


# A client that goes away.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(server, stream):
    connection = send_chat(server, max_tokens=5000, stream=stream, logit_bias={"2": -100, "0": -100})
    wait_until(lambda: server.generation.gauges.get("rows_decoding") == 1)
    assert not idle(server)  # the control: it would go on
    connection.close()
    wait_until(lambda: idle(server), 5)
    assert server.generation.gauges["kv_bytes"] >= 0


def test_a_client_that_goes_while_its_prompt_is_read(server):
    before = server.metrics["tokens_read"]
    connection = send_chat(server, messages=user(long_text(9000)))
    wait_until(lambda: server.metrics["tokens_read"] > before)
    connection.close()
    wait_until(lambda: idle(server), 5)
    assert server.metrics["tokens_read"] - before < 9000


def test_a_client_that_goes_while_it_waits(server):
    running = [send_chat(server, max_tokens=5000, logit_bias={"2": -100, "0": -100}) for _ in range(2)]
    wait_until(lambda: server.generation.gauges.get("rows_decoding") == 2)
    waiting = send_chat(server)
    wait_until(lambda: len(server.generation._waiting) == 1)
    waiting.close()
    wait_until(lambda: len(server.generation._waiting) == 0, 5)
    for connection in running:
        connection.close()


def test_a_stream_that_waits_is_told_so(server, monkeypatch):
    monkeypatch.setattr("mlx_dsa.serve.answer._TELL_SECONDS", 0.3)
    running = [send_chat(server, max_tokens=5000, logit_bias={"2": -100, "0": -100}) for _ in range(2)]
    wait_until(lambda: server.generation.gauges.get("rows_decoding") == 2)
    waiting = Client(server).events(ASK)
    assert next(waiting) == ": waiting"
    for connection in running:
        connection.close()
    events = list(waiting)
    assert events[-1] is None and events[-2]["choices"][0]["finish_reason"]


# Bounds.


def test_a_full_queue_is_told(server):
    long = dict(max_tokens=5000, logit_bias={"2": -100, "0": -100})
    connections = [send_chat(server, **long) for _ in range(2)]
    wait_until(lambda: server.generation.gauges.get("rows_decoding") == 2)
    connections += [send_chat(server) for _ in range(3)]
    wait_until(lambda: len(server.generation._waiting) == 3)
    status, headers, told = Client(server).send("POST", CHAT, ASK)
    assert status == 503 and int(headers["Retry-After"]) > 0 and "wait as may" in told["error"]["message"]
    for connection in connections:
        connection.close()


def test_a_prompt_beyond_the_positions_is_refused_before_it_is_read(server):
    before = server.metrics["tokens_read"]
    status, _, told = Client(server).send("POST", CHAT, {**ASK, "messages": user(long_text(40_000))})
    assert status == 400 and told["error"]["code"] == "context_length_exceeded" and "16,384" in told["error"]["message"]
    assert server.metrics["tokens_read"] == before


def test_the_context_may_be_bounded_further():
    with serving(max_context=100) as server:
        client = Client(server)
        status, _, told = client.send("POST", CHAT, {**ASK, "messages": user(long_text(200))})
        assert status == 400 and told["error"]["code"] == "context_length_exceeded"
        usage = client.chat("Hi", max_tokens=10_000, logit_bias={"2": -100, "0": -100})["usage"]
        assert usage["total_tokens"] == 100


def test_a_request_that_memory_has_no_room_for():
    import mlx.core as mx

    tiny()
    with serving(memory_limit=mx.get_active_memory() + (20 << 20)) as server:
        client = Client(server)
        assert client.chat("Hi", max_tokens=2)
        status, headers, told = client.send("POST", CHAT, {**ASK, "messages": user(long_text(8000))})
        assert status == 503 and "memory" in told["error"]["message"] and headers["Retry-After"]
        assert client.chat("Hi", max_tokens=2)


def test_a_head_alone(server):
    status, headers, body = Client(server).send("HEAD", "/health")
    assert status == 200 and int(headers["Content-Length"]) > 0 and not body
    assert Client(server).send("HEAD", "/v1/nothing")[0] == 404


def test_a_body_that_asks_before_it_comes(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    raw = json.dumps(ASK).encode()
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head % len(raw))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(raw)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_connections_are_bounded():
    with serving(max_connections=2) as server:
        first, second = Client(server), Client(server)
        assert first.get("/health")[0] == second.get("/health")[0] == 200
        assert b"503" in raw_request(server, b"GET /health HTTP/1.1\r\n\r\n").split(b"\r\n")[0]
        first.close()
        wait_until(lambda: raw_request(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"))


# What goes wrong inside.


class Broken(Snapshots):
    """A store that fails for some prompts."""

    fails = None

    def fetch_nearest_cache(self, model, tokens):
        if self.fails == "fetch":
            raise RuntimeError("no such thing")
        return super().fetch_nearest_cache(model, tokens)

    def insert_cache(self, *arguments, **options):
        if self.fails == "insert":
            raise RuntimeError("no such thing")
        super().insert_cache(*arguments, **options)


@pytest.fixture(scope="module")
def breakable():
    store = Broken(1 << 30)
    with serving(prompt_cache=store) as server:
        yield server, store


def test_a_request_that_can_not_begin_is_told_and_the_others_go_on(breakable):
    server, store = breakable
    client, other = Client(server), Client(server)
    running = other.events({"messages": user("Tell me"), "max_tokens": 60, "logit_bias": {"2": -100, "0": -100}})
    next(running)
    store.fails = "fetch"
    status, _, told = client.send("POST", CHAT, ASK)
    assert status == 500 and "\n" not in told["error"]["message"]
    store.fails = None
    last = [event for event in running if event is not None][-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert text_of(client.chat("Hi", max_tokens=2))


def test_what_is_not_kept_ends_no_answer(breakable):
    server, store = breakable
    store.fails = "insert"
    assert text_of(Client(server).chat("Hi", max_tokens=2))
    store.fails = None


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_told_and_the_next_request_works(breakable, monkeypatch, stream):
    server, _ = breakable
    calls = []

    def fail(rows):
        calls.append(1)
        raise RuntimeError("[metal] something private")

    client = Client(server)
    other = client.events({**ASK, "max_tokens": 500, "logit_bias": {"2": -100, "0": -100}}) if stream else None
    if stream:
        next(other)
    with monkeypatch.context() as patched:
        patched.setattr(type(server.generation._rows), "step", fail)
        if stream:
            event = [event for event in other if isinstance(event, dict)][-1]
            assert event["error"]["type"] == "server_error" and "private" not in event["error"]["message"]
        else:
            status, _, told = client.send("POST", CHAT, ASK)
            assert status == 500 and "private" not in told["error"]["message"]
    assert calls and server.generation.is_healthy
    assert text_of(Client(server).chat("Hi", max_tokens=2))
    wait_until(lambda: idle(server), 5)


def test_work_for_the_generation_thread(breakable):
    server, _ = breakable
    thread = server.generation._generation_thread
    assert server.generation.call(threading.current_thread) is thread
    with pytest.raises(ZeroDivisionError):
        server.generation.call(lambda: 1 / 0)
    # Also while it is busy.
    connection = send_chat(server, max_tokens=5000, logit_bias={"2": -100, "0": -100})
    wait_until(lambda: server.generation.gauges.get("rows_decoding") == 1)
    began = time.monotonic()
    assert server.generation.call(lambda: 5) == 5 and time.monotonic() - began < 2
    connection.close()
    wait_until(lambda: idle(server))


# The end.


def test_it_ends_after_the_answers_that_are_being_written():
    with serving() as server:
        client = Client(server)
        running = client.events({**ASK, "max_tokens": 60, "logit_bias": {"2": -100, "0": -100}})
        next(running)
        ended = []
        thread = threading.Thread(target=lambda: ended.append(server.drain(30)))
        thread.start()
        wait_until(lambda: server.generation.is_draining)
        status, headers, told = Client(server).send("POST", CHAT, ASK)
        assert status == 503 and headers["Retry-After"] and "stopping" in told["error"]["message"]
        assert Client(server).get("/health")[0] == 503
        events = [event for event in running if isinstance(event, dict)]
        assert events[-1]["choices"][0]["finish_reason"] == "length" and len(events) > 30
        thread.join()
        assert ended == [True]
        server.generation.stop_and_join()
        with pytest.raises(ApiError):
            server.generation.call(lambda: 1)
