"""What happens at once in a server: documents that come and go, the end, memory that is promised."""

import logging
import threading
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from serving import Client, idle, long_text, serving, tiny, user, wait_until
from test_serve_bounds import send_chat

from mlx_dsa.serve import documents as documents_module
from mlx_dsa.serve import heap as heap_module
from mlx_dsa.serve import row as row_module
from mlx_dsa.serve import rows
from mlx_dsa.serve import store as store_module
from mlx_dsa.serve.answer import Answer
from mlx_dsa.serve.errors import ApiError
from mlx_dsa.serve.heap import Heap
from mlx_dsa.serve.snapshots import Snapshots
from mlx_dsa.serve.store import SnapshotStore


@pytest.fixture
def served(tmp_path):
    with serving(dense=False, store=str(tmp_path)) as server:
        yield server


def test_a_client_that_leaves_a_stream_is_no_failed_connection(served, caplog):
    caplog.set_level(logging.INFO, "mlx_dsa.serve")
    connection = send_chat(served, max_tokens=3000, stream=True, logit_bias={"2": -100, "0": -100})
    connection.recv(100)
    connection.close()
    wait_until(lambda: idle(served))
    wait_until(lambda: "POST /v1/chat/completions" in caplog.text)
    time.sleep(0.1)
    assert "A connection failed" not in caplog.text


def test_documents_of_which_one_begins_with_the_other_are_read_at_once():
    snapshots, short, long = Snapshots(1 << 20), [5, 6, 7], [5, 6, 7, 8, 9]
    snapshots.begin_document([*short, 7], 3, -1)
    snapshots.begin_document([*long, 9], 5, -2)
    snapshots.insert_cache("m", long, ["of the long one"], cache_type="document")
    snapshots.insert_cache("m", short, ["of the short one"], cache_type="document")
    snapshots.insert_cache("m", [*long, 9], ["its end"], cache_type="assistant")
    assert snapshots.end_document(-1) == ["of the short one"]
    assert snapshots.end_document(-2) == ["of the long one"] and not len(snapshots)


def test_nothing_is_kept_of_a_document_that_was_deleted_while_it_was_asked(served):
    client = Client(served)
    _, _, told = client.send("POST", "/v1/documents", {"text": long_text(100)})
    connection = send_chat(served, document=told["id"], max_tokens=400, logit_bias={"2": -100, "0": -100})
    wait_until(lambda: served.generation.gauges.get("rows_decoding") == 1)
    assert client.send("DELETE", f"/v1/documents/{told['id']}")[0] == 200
    wait_until(lambda: idle(served), 30)
    kept = served.generation.call(lambda: [s.tokens[0] for s in served.generation.prompt_cache._there])
    assert not [first for first in kept if first < 0]
    connection.close()


def test_a_document_can_be_asked_as_soon_as_it_is_found(monkeypatch):
    """Found and not in memory yet, it had no file to come from."""
    pin, found = documents_module.Documents._pin, []

    def looked(self, document, caches):
        found.append(document.id in self._there)
        pin(self, document, caches)

    monkeypatch.setattr(documents_module.Documents, "_pin", looked)
    with serving(dense=False) as server:
        assert Client(server).send("POST", "/v1/documents", {"text": long_text(100)})[0] == 200
    assert found == [False]


def test_the_end_waits_for_a_document_until_it_is_kept(tmp_path, monkeypatch):
    write, writing = documents_module.write_saved, threading.Event()

    def slowly(*arguments):
        writing.set()
        time.sleep(0.7)
        write(*arguments)

    monkeypatch.setattr(documents_module, "write_saved", slowly)
    told = []
    with serving(dense=False, store=str(tmp_path)) as server:
        send = lambda: told.append(Client(server).send("POST", "/v1/documents", {"text": long_text(100)}))  # noqa: E731
        thread = threading.Thread(target=send)
        thread.start()
        assert writing.wait(20) and server.drain(20)
        assert len(server.generation.documents.listed()) == 1
        thread.join()
        with pytest.raises(ApiError, match="stopping"):
            server.generation.documents.create("More text.", "x")
    assert told[0][0] == 200
    with serving(dense=False, store=str(tmp_path)) as server:
        assert [d["id"] for d in Client(server).get("/v1/documents")[2]["data"]] == [told[0][2]["id"]]


def test_documents_are_left_on_disk_where_memory_is_wanted(served):
    client, documents = Client(served), served.generation.documents
    ids = [client.send("POST", "/v1/documents", {"text": long_text(n)})[2]["id"] for n in (100, 150, 200)]
    ask = {"content": "What was calm?", "max_tokens": 8}
    answers = [client.chat(document=i, **ask)["choices"][0]["message"] for i in ids]
    stays, caches = documents.find(ids[0]).number, served.generation.prompt_cache
    served.generation.call(lambda: documents.free(1 << 40, stays))
    assert list(caches._documents) == [stays]
    served.generation.call(lambda: caches.trim_to(n_bytes=0))
    assert [client.chat(document=i, **ask)["choices"][0]["message"] for i in ids] == answers


def test_memory_that_is_promised_is_not_given_twice():
    """Requests that are admitted at once have read nothing yet."""
    token = 2 * 2 * 64 * 8 * 4
    limit = mx.get_active_memory() + int(2.5 * 2100 * token)
    with serving(snapshot_bytes=0, memory_limit=limit) as server:
        limit_of = server.provider.token_bytes
        assert limit_of == token
        most, threads, told = [], [], []
        add = server.generation._rows.add
        server.generation._rows.add = lambda ticket: (add(ticket), most.append(len(server.generation._rows)))
        gate = threading.Event()
        hold = threading.Thread(target=server.generation.call, args=(lambda: gate.wait(20),))
        hold.start()
        for i in range(5):
            body = {"messages": user(f"{i} {long_text(1800)}"), "max_tokens": 4}
            send = lambda body=body: told.append(Client(server).send("POST", "/v1/chat/completions", body))  # noqa: E731
            threads.append(threading.Thread(target=send))
            threads[-1].start()
        wait_until(lambda: len(server.generation._waiting) == 5)
        gate.set()
        for thread in [hold, *threads]:
            thread.join()
        assert [status for status, _, _ in told] == [200] * 5 and max(most) == 2


def test_a_snapshot_that_can_not_be_written_ends_no_thread(tmp_path, monkeypatch):
    failures = []

    def fail(*_arguments):
        failures.append(1)
        raise RuntimeError("the disk is odd")

    monkeypatch.setattr(store_module, "write_saved", fail)
    monkeypatch.setattr(store_module, "pack_saved", lambda *_: ({"a": mx.zeros(3)}, {}))
    with serving(dense=False) as server:
        store = SnapshotStore(tmp_path, 1 << 20)
        store.attach(server.provider.patch)
        store._patch = SimpleNamespace(config="", prune=lambda caches: None)
        for n in range(5):
            store.save(np.arange(n + 1, dtype=np.int32), "", [])
            time.sleep(0.05)
        assert len(failures) == 5
        store.close()


def test_a_client_that_does_not_read_holds_up_nobody_and_is_told(monkeypatch):
    monkeypatch.setattr(row_module, "_MOST_WAITING", 50)
    with serving(dense=False) as server:
        taken, wait = Answer._tokens, threading.Event()

        def slowly(self):
            for piece in taken(self):
                wait.wait(30)
                yield piece

        monkeypatch.setattr(Answer, "_tokens", slowly)
        connection = send_chat(server, max_tokens=5000, stream=True, logit_bias={"2": -100, "0": -100})
        wait_until(lambda: server.metrics["requests_cancelled"] == 1)
        assert server.metrics["tokens_generated"] < 100
        wait.set()
        connection.settimeout(20)
        got = b""
        while b"0\r\n\r\n" not in got and (piece := connection.recv(65536)):
            got += piece
        assert b"was not taken" in got
        assert Client(server).chat("Hi", max_tokens=2)
        connection.close()


def test_a_limit_of_memory_below_the_model_is_refused():
    tiny()
    with pytest.raises(ValueError, match="the model alone takes"), serving(memory_limit=1 << 20):
        pass


# What a client may send.


def test_short_and_odd_chats(served):
    client = Client(served)
    bodies = [
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": ""}],
        [*user("Hi"), {"role": "assistant", "content": "Hello, I"}],
        [
            *user("Weather?"),
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
    ]
    for messages in bodies:
        whole = client.chat(messages, max_tokens=12)
        again = client.chat(messages, max_tokens=12)
        assert whole["choices"][0]["message"] == again["choices"][0]["message"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
        assert client.chat(messages, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_characters_and_stops_that_lie_over_tokens(served):
    """However tokens cut a text, a stream's pieces are whole characters, and stops are found in them."""
    client, tokenizer = Client(served), tiny().tokenizer
    wanted = "naïve 日本 🙂 end"
    ids = tokenizer.encode(wanted, add_special_tokens=False)
    assert len(ids) > 8

    class Forced:
        def __init__(self):
            self.left = list(ids)

        def __call__(self, logprobs):
            return mx.array([self.left.pop(0) if self.left else tokenizer.eos_token_id])

    original, rows.sampler_of = rows.sampler_of, lambda *_: Forced()
    try:
        for stop, text in ((None, wanted), ("🙂", "naïve 日本 "), ("本 🙂 e", "naïve 日"), ("nd", "naïve 日本 🙂 e")):
            told = client.stream("Say it", max_tokens=len(ids) + 1, stop=stop)
            pieces = [t["choices"][0]["delta"].get("content") or "" for t in told if t["choices"]]
            assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
            assert client.chat("Say it", max_tokens=len(ids) + 1, stop=stop)["choices"][0]["message"]["content"] == text
    finally:
        rows.sampler_of = original


def test_what_is_free_is_given_back_once_after_work(monkeypatch):
    heap, given = Heap(), []
    monkeypatch.setattr(heap_module, "_IDLE_SECONDS", 0.05)
    heap._trim = given.append
    for is_busy, wait in ((False, 0), (True, 0), (False, 0), (True, 0.1), (False, 0.1), (False, 0), (False, 0.1)):
        time.sleep(wait)
        heap.note(is_busy)
    assert given == [0]
    Heap()._trim(0)  # what this system has
