"""Documents that a server reads once and is asked about often."""

import base64
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_dsa import load_preset, patch_sparse_generate, saved
from mlx_dsa.cli.conversation import Conversation
from mlx_dsa.serve.bodies import plain_arguments
from mlx_dsa.serve.documents import Documents
from mlx_dsa.serve.errors import ApiError, Gone
from mlx_dsa.serve.generation import Generation
from mlx_dsa.serve.metrics import Metrics
from mlx_dsa.serve.options import ServeOptions
from mlx_dsa.serve.provider import Provider
from mlx_dsa.serve.segments import prompt_of
from mlx_dsa.serve.snapshots import Snapshots
from mlx_dsa.serve.store import SnapshotStore
from mlx_dsa.serve.ticket import Request
from mlx_dsa.tasks.documents import load_documents

LARGE = 1 << 30
FACT = "The secret code of the vault in Lisbon is 48213."
QUESTION = "What is the secret code of the vault in Lisbon?"


@pytest.fixture(scope="module")
def preset():
    return load_preset("tiny")


@pytest.fixture(scope="module")
def text():
    prose = "\n\n".join(document.text for document in load_documents())[:2600]
    half = prose.index(". ", 1200) + 2
    return f"{prose[:half]}{FACT} {prose[half:]}"


@pytest.fixture
def start(preset):
    """Return a function that starts a generation thread with documents."""
    running = []

    def make(folder=None, dense=False, snapshots=None, **options):
        patch = None if dense else patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config))
        served = ServeOptions(prompt_chunk=256)
        provider = Provider(preset.model, preset.tokenizer, "tiny", served, patch)
        store = None if folder is None else SnapshotStore(folder / "snapshots", LARGE)
        snapshots = Snapshots(LARGE, store) if snapshots is None else snapshots
        generation = Generation(provider, snapshots, served, Metrics())
        running.append((generation, snapshots))
        generation.call(lambda: snapshots.attach(patch))
        documents = Documents(generation, snapshots, folder=folder and folder / "documents", **options)
        documents.attach()

        def ask(ident, *messages, n=24):
            messages = [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 9, messages)]
            request = Request("chat", "", messages, None, None)
            if ident is None:
                request.tokens = preset.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            else:
                request.tokens, request.segments, request.segment_types, *_ = documents.tokenize(ident, messages)
            context, pieces = generation.generate(request, plain_arguments(n))
            said = list(pieces)
            answer = "".join(piece.text for piece in said)
            return SimpleNamespace(text=answer, cached=context.prompt_cache_count, tokens=[p.token for p in said])

        def stop():
            generation.call(snapshots.close)
            generation.stop_and_join()
            running.remove((generation, snapshots))

        return SimpleNamespace(
            documents=documents, generation=generation, snapshots=snapshots, ask=ask, stop=stop, patch=patch
        )

    yield make
    for generation, _ in running:
        generation.stop_and_join()


def test_a_document_is_read_once_and_asked_as_the_library_asks(start, preset, text):
    server = start()
    told = []
    made = server.documents.create(text, "prose", tell=lambda *progress: told.append(progress))
    assert made["object"] == "document" and made["status"] == "ready" and made["name"] == "prose"
    assert made["entries"] == preset.config.top_k and made["tokens"] > 2 * made["entries"]
    assert told[-1][0] >= made["tokens"] and len(told) > 2
    n = len(told)
    again = server.documents.create(text, "again", tell=lambda *progress: told.append(progress))
    assert again == made and len(told) == n
    assert server.documents.listed() == [made]
    questions = [QUESTION, "Who is it about?"]
    asked = [server.ask(made["id"], question) for question in questions]
    assert [a.cached for a in asked] == [made["tokens"]] * 2 and "48213" in asked[0].text
    again = server.ask(made["id"], QUESTION)
    assert again.text == asked[0].text and again.cached > made["tokens"]
    server.stop()
    with patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config)):
        for question, answer in zip(questions, asked):
            chat = Conversation(preset.model, preset.tokenizer, max_tokens=24)
            chat.read(text)
            assert "".join(chat.ask(question)) == answer.text


def test_later_turns_are_what_the_template_renders(start, preset, text):
    server = start()
    made = server.documents.create(text, "prose", system="Be short.")
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "48213"},
        {"role": "user", "content": "Thank you!"},
    ]
    prompt = server.documents.tokenize(made["id"], turns)[0]
    whole = [{"role": "system", "content": "Be short."}, *turns]
    whole[1] = {"role": "user", "content": f"{text.strip()}\n\n{QUESTION}"}
    rendered = preset.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    document = server.documents.find(made["id"]).tokens
    assert preset.tokenizer.decode([document[0], *prompt[1:]]) == rendered
    assert prompt[: len(document)] == [prompt[0], *document[1:]] and prompt[0] < 0
    first = server.ask(made["id"], QUESTION)
    later = server.ask(made["id"], QUESTION, "In other words: 48213.", "Thank you!")
    assert first.cached == made["tokens"] and later.cached > made["tokens"] + 5
    assert len(later.tokens)


def test_a_chat_without_the_document_does_not_read_from_it(start, text):
    """A client's answer is what it would get alone."""
    server = start()
    made = server.documents.create(text, "prose")
    server.ask(made["id"], QUESTION)
    assert server.ask(None, f"{text.strip()}\n\n{QUESTION}", n=2).cached == 0


def test_many_ask_at_once(start, text):
    server = start()
    other = text.replace("48213", "90577")
    made = [server.documents.create(t, "prose")["id"] for t in (text, other)]
    alone = [server.ask(ident, QUESTION).text for ident in made]
    assert alone[0] != alone[1] and "90577" in alone[1]
    found = [None] * 8

    def ask(i):
        found[i] = server.ask(made[i % 2], QUESTION).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == alone * 4


def test_what_is_kept_is_told_by_token(start, preset, text):
    server = start()
    made = server.documents.create(text, "prose")
    told = server.documents.kept(made["id"])
    document = server.documents.find(made["id"])
    assert "".join(told["pieces"]) == preset.tokenizer.decode(document.tokens)
    assert len(told["pieces"]) == made["tokens"] and told["layers"] == list(range(len(preset.model.layers)))
    caches = server.snapshots.pinned(document.number).caches
    for cache, bits in zip(caches, told["kept"]):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))
        assert np.flatnonzero(bits).tolist() == np.sort(np.array(cache.positions)[0]).tolist()
        assert bits.sum() == preset.config.top_k


def test_what_an_answer_reads_is_found(start, text):
    server = start()
    made = server.documents.create(text, "prose")
    asked = [{"role": "user", "content": QUESTION}]
    pieces = server.documents.kept(made["id"])["pieces"]
    starts = np.cumsum([0, *map(len, pieces)])
    where = "".join(pieces).index("48213")
    spans = set(np.flatnonzero((starts[:-1] < where + 5) & (starts[1:] > where)).tolist())
    before = server.documents.kept(made["id"])["kept"]
    read = server.documents.read(made["id"], asked, "48213")
    assert len(read) == 50 and [share for _, share in read] == sorted((s for _, s in read), reverse=True)
    assert len(spans & {i for i, _ in read[: len(spans)]}) >= len(spans) - 1
    control = server.documents.read(made["id"], asked, "zebra")
    assert not spans & {i for i, _ in control[: len(spans)]}
    shares = [sum(s for i, s in found if i in spans) for found in (read, control)]
    assert shares[0] > 3 * shares[1]
    assert server.documents.kept(made["id"])["kept"] == before  # the document itself is as it was
    assert server.ask(made["id"], QUESTION).cached == made["tokens"]
    with pytest.raises(ApiError, match="'answer' is empty"):
        server.documents.read(made["id"], asked, "")


REFUSED = {
    "system": ([{"role": "system", "content": "Be long."}, {"role": "user", "content": "x"}], {}, "read without one"),
    "no user": ([{"role": "assistant", "content": "x"}], {}, "begins with a message of the user"),
    "nothing": ([], {}, "begins with a message of the user"),
    "tools": ([{"role": "user", "content": "x"}], {"tools": [{"type": "function"}]}, "without tools"),
    "late": (
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
        {},
        "begins with a message of the user",
    ),
    "template": ([{"role": "user", "content": "x"}], {"options": {"chat_template": "{{ 1 }}"}}, "leaves out"),
    "other": (
        [{"role": "user", "content": "x"}],
        {"options": {"chat_template": "> {{ messages[0].content }}"}},
        "change what stands before",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_document_was_not_read_with_is_refused(start, case):
    server = start()
    ident = server.documents.create("A short text.", "short")["id"]
    messages, options, told = REFUSED[case]
    with pytest.raises(ApiError, match=told) as error:
        server.documents.tokenize(ident, messages, **options)
    assert error.value.status == 400 and "\n" not in str(error.value)


def test_what_is_no_document_is_refused(start):
    server = start(max_bytes=1000)
    for sent, told in (
        (("", "n"), "empty"),
        ((" \n", "n"), "empty"),
        (("\ud800", "n"), "must be text"),
        (("x", "n", "\udfff"), "must be text"),
    ):
        with pytest.raises(ApiError, match=told) as error:
            server.documents.create(*sent)
        assert error.value.status == 400
    with pytest.raises(ApiError, match="no room") as error:
        server.documents.create("word " * 300, "n")
    assert error.value.status == 503 and error.value.headers["Retry-After"]
    for ask in (server.documents.find, server.documents.delete, server.documents.kept):
        with pytest.raises(ApiError, match="There is no document 'doc-x'") as error:
            ask("doc-x")
        assert error.value.status == 404
    assert server.documents.listed() == []


def test_a_client_that_goes_away_stops_the_reading(start, text):
    server = start()
    told = []
    with pytest.raises(Gone):
        server.documents.create(text * 8, "long", tell=lambda *p: told.append(p), has_gone=lambda: len(told) > 1)
    assert server.documents.listed() == [] and server.snapshots.stats()["documents_in_memory"] == 0
    assert max(done for done, _ in filter(None, told)) < 8000
    assert server.documents.create(text, "prose")["status"] == "ready"


def test_the_same_text_twice_at_once_is_read_once(start, text):
    server = start()
    read, made = [], []
    send = lambda: made.append(server.documents.create(text, "prose", tell=lambda *p: read.append(p)))  # noqa: E731
    threads = [threading.Thread(target=send) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert made[0] == made[1] == made[2] and len(server.documents.listed()) == 1
    assert sum(p[0] == p[1] for p in read if p) <= 2


def test_a_document_of_a_dense_model(start, text):
    server = start(dense=True)
    made = server.documents.create(text[900:2000], "prose")
    assert made["entries"] == made["tokens"]
    asked = server.ask(made["id"], QUESTION)
    assert asked.cached == made["tokens"]
    assert all(isinstance(c, KVCache) for c in server.snapshots.pinned(-1).caches)
    told = server.documents.kept(made["id"])
    assert np.unpackbits(np.frombuffer(base64.b64decode(told["kept"][0]), np.uint8)).sum() == made["tokens"]
    assert len(server.documents.read(made["id"], [{"role": "user", "content": QUESTION}], "48213")) == 50


def test_documents_and_their_conversations_survive_a_restart(start, text, tmp_path):
    server = start(tmp_path)
    made = server.documents.create(text, "prose")
    long = f"{QUESTION} Take your time, and look at each line. " * 4
    first = server.ask(made["id"], long)
    server.stop()
    again = start(tmp_path)
    assert again.documents.listed() == [made]
    assert again.snapshots.stats()["documents_in_memory"] == 0  # until it is asked
    later = again.ask(made["id"], long, first.text, "Why?")
    assert later.cached > made["tokens"] + 64 and again.snapshots.stats()["loaded"] == 1
    assert again.ask(made["id"], QUESTION).cached >= made["tokens"]
    assert again.documents.create(text, "other name") == made
    again.documents.delete(made["id"])
    with pytest.raises(ApiError, match="There is no document"):
        again.ask(made["id"], QUESTION)
    assert again.documents.listed() == []
    again.stop()  # which waits for what is being written
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("harm", ["cut", "flipped", "garbage"])
def test_a_damaged_document_is_absent_and_can_be_sent_again(start, text, tmp_path, caplog, harm):
    server = start(tmp_path)
    made = server.documents.create(text, "prose")
    server.stop()
    (path,) = (tmp_path / "documents").iterdir()
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-9], "flipped": data[:-9] + b"123456789", "garbage": data[9:]}[harm])
    (tmp_path / "documents" / "left.mlx-dsa-99999999-0123abcd.part.safetensors").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = start(tmp_path)
    if harm == "garbage":
        assert len(caplog.records) == 1 and str(path) in caplog.records[0].getMessage()
    else:  # a checksum is verified when the document is asked
        with pytest.raises(ApiError, match="Send the document again") as error:
            again.ask(made["id"], QUESTION)
        assert error.value.status == 404
    assert again.documents.listed() == []
    assert again.documents.create(text, "prose")["tokens"] == made["tokens"]
    assert "48213" in again.ask(made["id"], QUESTION).text


def test_what_has_no_room_in_memory_is_on_disk(start, text, tmp_path):
    server = start(tmp_path, memory_bytes=1)
    made = [server.documents.create(text.replace("48213", code), "prose")["id"] for code in ("48213", "90577")]
    assert server.snapshots.stats()["documents_in_memory"] == 1
    for ident, code in zip(made, ("48213", "90577")):
        assert code in server.ask(ident, QUESTION).text
    assert server.snapshots.stats()["documents_in_memory"] == 1


def test_documents_stay_in_memory_without_a_folder(start, text):
    server = start(memory_bytes=1)
    for code in ("48213", "90577"):
        server.documents.create(text.replace("48213", code), "prose")
    assert server.snapshots.stats()["documents_in_memory"] == 2


def test_a_question_on_a_long_prompt(start, preset):
    """What the issue asks for: of 729 tokens nothing, all but the question, all is known."""
    server = start()
    tokenizer, config = preset.tokenizer, server.patch.config

    def ask(question):
        asked = [{"role": "user", "content": f"{'It is a long day. ' * 118}day day day day\n\n{question}"}]
        request = Request("chat", "", asked, None, None)
        request.tokens, request.segments, request.segment_types, *_ = prompt_of(tokenizer, asked, {}, config)
        context, pieces = server.generation.generate(request, plain_arguments(8))
        return len(request.tokens), context.prompt_cache_count, "".join(p.text for p in pieces)

    (n, *first), other, (_, *again) = ask("Is it?"), ask("Or is the night longer?"), ask("Is it?")
    assert n == 729 > config.top_k
    n_question = len(tokenizer.encode("Is it?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False))
    assert (first[0], other[1], again[0]) == (0, n - n_question, n - 1)
    assert again[1] == first[1]


def test_a_full_disk_is_told_and_leaves_nothing(start, text, tmp_path, monkeypatch, caplog):
    server = start(tmp_path)
    ident = server.documents.create(text, "prose")["id"]

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "write_sealed", fail)
    with pytest.raises(ApiError, match="No space left on device") as error:
        server.documents.create(f"{text} More.", "more")
    assert error.value.status == 503 and len(server.documents.listed()) == 1
    with caplog.at_level(logging.WARNING):
        assert "48213" in server.ask(ident, f"{QUESTION} Take your time, and look at each line. " * 4).text
        server.stop()
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("documents", "snapshots")] == [1, 0]
    assert any("No space left" in record.getMessage() for record in caplog.records)
