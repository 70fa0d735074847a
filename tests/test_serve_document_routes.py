"""The addresses of documents, over HTTP."""

import json
import urllib.error
import urllib.request

import pytest

from mlx_dsa import load_preset, patch_sparse_generate
from mlx_dsa.serve.document_routes import add_routes
from mlx_dsa.serve.documents import Documents
from mlx_dsa.serve.options import ServeOptions
from mlx_dsa.serve.provider import Provider
from mlx_dsa.serve.server import Server
from mlx_dsa.serve.snapshots import Snapshots

QUESTION = "What is the secret code of the vault in Lisbon?"


@pytest.fixture
def text():
    return "It was a long day in the town by the river. " * 40


@pytest.fixture
def served():
    preset = load_preset("tiny")
    patch = patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config))
    options = ServeOptions(port=0, prompt_chunk=128)
    snapshots = Snapshots(1 << 30)
    server = Server(Provider(preset.model, preset.tokenizer, "tiny", options, patch), options, snapshots)
    documents = Documents(server.generation, snapshots)
    server.generation.call(lambda: snapshots.attach(patch))
    documents.attach()
    add_routes(server, documents)
    server.start()
    yield lambda method, path, body=None, kind="application/json", **headers: call(
        server.url, method, path, body, kind, headers
    )
    server.stop()


def call(url, method, path, body, kind, headers):
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url + path, data, {"Content-Type": kind, **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    return status, raw.decode() if raw.startswith((b"data:", b":")) else json.loads(raw)


def form(**parts):
    lines = []
    for name, (filename, value) in parts.items():
        file = f'; filename="{filename}"' if filename else ""
        lines += [b"--edge", f'Content-Disposition: form-data; name="{name}"{file}'.encode(), b"", value]
    return b"\r\n".join([*lines, b"--edge--", b""])


def test_the_addresses_of_documents(served, text):
    status, made = served("POST", "/v1/documents", {"text": text, "name": " a\n b "})
    assert status == 200 and made["name"] == "a b" and made["status"] == "ready"
    sent = text.encode()
    for answer in (
        served("POST", "/v1/documents?name=n.txt", sent, "text/plain; charset=utf-8"),
        served("POST", "/v1/documents", form(file=("t.txt", sent)), "multipart/form-data; boundary=edge"),
    ):
        assert answer == (200, made)
    status, events = served("POST", "/v1/documents?stream=true", {"text": f"{text} More."})
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line.startswith("data: ")]
    assert status == 200 and lines[-1] == "[DONE]" and json.loads(lines[-2])["object"] == "document"
    told = [json.loads(line) for line in lines[:-2]]
    assert len(told) > 3 and {t["object"] for t in told} == {"document.progress"}
    assert [t["tokens"] for t in told] == sorted(t["tokens"] for t in told)
    ident = made["id"]
    listed = served("GET", "/v1/documents")[1]
    assert listed["object"] == "list" and listed["data"][0] == made and len(listed["data"]) == 2
    assert served("GET", f"/v1/documents/{ident}") == (200, made)
    assert len(served("GET", f"/v1/documents/{ident}/kept")[1]["pieces"]) == made["tokens"]
    asked = {"messages": [{"role": "user", "content": QUESTION}], "answer": "48213"}
    assert len(served("POST", f"/v1/documents/{ident}/read", asked)[1]["read"]) == 50
    assert served("DELETE", f"/v1/documents/{ident}") == (
        200,
        {"id": ident, "object": "document.deleted", "deleted": True},
    )
    assert served("GET", f"/v1/documents/{ident}")[0] == 404


def test_what_is_no_request_for_a_document_is_told(served):
    said = [{"role": "user", "content": "x"}]
    edge = "multipart/form-data; boundary=edge"
    for status, arguments in {
        "no text": (400, ("POST", "/v1/documents", {"name": "x"})),
        "text": (400, ("POST", "/v1/documents", {"text": 5})),
        "name": (400, ("POST", "/v1/documents", {"text": "x", "name": 5})),
        "system": (400, ("POST", "/v1/documents", {"text": "x", "system": []})),
        "json": (400, ("POST", "/v1/documents", b"{")),
        "bytes": (400, ("POST", "/v1/documents", b"\xff\xfe", "text/plain")),
        "zero": (400, ("POST", "/v1/documents", b"a\0b", "text/plain")),
        "kind": (415, ("POST", "/v1/documents", b"x", "image/png")),
        "form": (400, ("POST", "/v1/documents", b"x", edge)),
        "no edge": (400, ("POST", "/v1/documents", b"x", "multipart/form-data")),
        "no file": (400, ("POST", "/v1/documents", form(other=(None, b"x")), edge)),
        "twice": (
            400,
            ("POST", "/v1/documents", form(file=("a", b"x"))[: -len(b"--edge--\r\n")] + form(file=("b", b"y")), edge),
        ),
        "unknown": (404, ("GET", "/v1/documents/doc-x")),
        "kept": (404, ("GET", "/v1/documents/doc-x/kept")),
        "beyond": (404, ("GET", "/v1/documents/doc-x/other")),
        "read": (
            404,
            ("POST", "/v1/documents/doc-x/read", {"messages": said, "answer": "y"}),
        ),
        "answer": (400, ("POST", "/v1/documents/doc-x/read", {"messages": [], "answer": 5})),
        "delete": (404, ("DELETE", "/v1/documents/doc-x")),
        "post": (404, ("POST", "/v1/documents/doc-x", {"text": "x"})),
        "method": (405, ("DELETE", "/v1/documents")),
    }.values():
        answer = served(*arguments)
        assert answer[0] == status, arguments
        assert answer[1]["error"]["message"] and "\n" not in answer[1]["error"]["message"]
