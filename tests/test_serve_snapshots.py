"""What a server keeps of prompts, for prompts that begin alike."""

import gc
import logging
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from builders import VOCAB, make_indexers, make_model, make_tokens
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_dsa import load_preset, patch_sparse_generate
from mlx_dsa.serve import snapshots as module
from mlx_dsa.serve.copies import hold
from mlx_dsa.serve.segments import plain_segments, segments_of
from mlx_dsa.serve.snapshots import Snapshots
from mlx_dsa.serve.store import SnapshotStore

LARGE = 1 << 30
STREAM = dict(top_k=32, n_recent=8, n_sink=2, prefill="stream", stream_chunk=24, positions="compact")
EXACT = dict(top_k=48, n_recent=8, n_sink=2, prefill="exact")


class Server:
    """Serve one request after another, as mlx-lm's server does a batch of one."""

    def __init__(self, model, patch, snapshots, step=64):
        self.model, self.patch, self.snapshots, self.step = model, patch, snapshots, step
        snapshots.attach(patch)

    def ask(self, prompt, cuts=None, n=4):
        """Return the answer, its logits, and how many tokens of the prompt were cached."""
        config = self.patch.config if self.patch else None
        segments, kinds = cuts or plain_segments(prompt, config)
        caches, rest = self.snapshots.fetch_nearest_cache("m", prompt)
        assert rest and list(prompt[len(prompt) - len(rest) :]) == rest
        done = len(prompt) - len(rest)
        caches = caches or make_prompt_cache(self.model)
        assert all(c.offset == done for c in caches if hasattr(c, "offset"))
        cached, place = done, 0
        segments = [*segments[:-1], segments[-1][:-1], segments[-1][-1:]]
        for segment, kind in zip(segments[:-1], kinds):
            place += len(segment)
            if place <= cached:
                continue
            while done < place:
                stop = min(done + self.step, place)
                self.model(mx.array([prompt[done:stop]]), cache=caches)
                mx.eval([c.state for c in caches])
                done = stop
            self.snapshots.insert_cache("m", prompt[:done], module.trimmed(caches, 0), cache_type=kind)
        token, answer, logits = prompt[-1], [], []
        for _ in range(n):
            logits.append(self.model(mx.array([[token]]), cache=caches)[0, -1])
            token = logits[-1].argmax().item()
            answer.append(token)
        self.snapshots.insert_cache("m", [*prompt, *answer[:-1]], caches)
        return SimpleNamespace(tokens=answer, logits=mx.stack(logits), cached=cached)


@pytest.fixture
def served():
    """Return a function that makes a server on a small random model."""
    patches = []

    def make(snapshots=None, settings=STREAM, model=None, like=None):
        model = like.model if like else model or make_model()
        patch = like.patch if like else None
        if settings is not None and like is None:
            patch = patch_sparse_generate(model, make_indexers(model, retention_dim=8), **settings)
            patches.append(patch)
        return Server(model, patch, Snapshots(LARGE) if snapshots is None else snapshots)

    yield make
    for patch in patches:
        patch.restore()


def words(n, seed=2):
    return make_tokens(n, seed=seed)[0].tolist()


def close(a, b, within=1e-4):
    return mx.abs(a.logits - b.logits).max().item() <= within


@pytest.mark.parametrize("settings", [STREAM, EXACT, None], ids=["stream", "exact", "dense"])
@pytest.mark.parametrize("length", [40, 71, 72, 73, 100, 118, 121])
def test_another_question_and_the_first_again(served, settings, length):
    """Of one prompt all is re-used but the question, of the same one all but a token."""
    text, questions = words(length), [words(12, seed=s) for s in (5, 6)]
    questions[1][0] = (questions[0][0] + 1) % VOCAB
    server = served(settings=settings)
    cold = served(Snapshots(0), like=server)
    first, other, again = (server.ask([*text, *questions[i]]) for i in (0, 1, 0))
    assert (first.cached, other.cached, again.cached) == (0, length, length + 11)
    for asked, i in ((first, 0), (other, 1), (again, 0)):
        alone = cold.ask([*text, *questions[i]])
        assert alone.cached == 0 and close(asked, alone)


def test_without_the_place_before_the_cut_a_stream_reads_again(served):
    """The control of what "context" is for."""
    text, questions = words(70), [words(12, seed=s) for s in (5, 6)]
    server = served()
    prompts = [[*text, *question] for question in questions]
    server.ask(prompts[0], ([prompts[0]], ["prompt"]))
    assert server.ask(prompts[1], ([prompts[1]], ["prompt"])).cached == 0
    assert served(model=make_model(seed=4)).ask(prompts[0]).cached == 0


@pytest.mark.parametrize("settings", [STREAM, EXACT, None], ids=["stream", "exact", "dense"])
def test_a_next_turn_reads_the_answer_and_itself(served, settings):
    """A template that renders the answer another way finds the end of the user's turn."""
    server = served(settings=settings)
    turn, tail = words(90), [7]  # what only the open answer begins with
    first = server.ask([*turn, *tail], ([turn, tail], ["user", "prompt"]))
    later = [*turn, *[t for t in first.tokens if t != 7], *words(20, seed=9)]
    assert server.ask(later).cached == 90
    going_on = [*turn, *tail, *first.tokens[:-1], *words(5, seed=8)]
    assert server.ask(going_on).cached == 94


def test_a_conversation_that_evicted_goes_on_as_the_library_does(served):
    server = served(settings=EXACT)
    first = server.ask(words(90), n=6)
    prompt = [*words(90), *first.tokens[:-1], *words(11, seed=8)]
    asked = server.ask(prompt, n=4)
    assert asked.cached == 95
    caches = make_prompt_cache(server.model)
    feed(server, caches, words(90)[:-1], first=True)
    for token in (words(90)[-1], *first.tokens[:-1]):
        server.model(mx.array([[token]]), cache=caches)
    feed(server, caches, prompt[95:-1])
    logits = server.model(mx.array([prompt[-1:]]), cache=caches)[0, -1]
    assert mx.abs(logits - asked.logits[0]).max().item() < 1e-4
    cold = served(Snapshots(0), like=server)
    assert not close(asked, cold.ask(prompt))  # the control: reading it anew is another thing


def feed(server, caches, tokens, first=False):
    server.model(mx.array([tokens]), cache=caches)
    mx.eval([c.state for c in caches])


def test_what_was_handed_out_is_a_copy(served):
    server = served(settings=None)
    prompt = words(50)
    server.ask(prompt)
    caches, rest = server.snapshots.fetch_nearest_cache("m", prompt)
    server.model(mx.array([words(30, seed=6)]), cache=caches)
    mx.eval([c.state for c in caches])
    again, rest_again = server.snapshots.fetch_nearest_cache("m", prompt)
    assert rest == rest_again == prompt[-1:]
    assert all(c.offset == 49 for c in again)
    assert server.snapshots.fetch_nearest_cache("another model", prompt) == (None, prompt)


def bytes_of(server):
    server.ask(words(60), ([words(60)], ["prompt"]))
    return server.snapshots.nbytes


def test_the_least_recently_used_go(served):
    one = bytes_of(served())
    server = served(Snapshots(int(4.5 * one)), model=make_model(seed=3))
    prompts = [words(60, seed=s) for s in range(10, 15)]
    for prompt in prompts[:4]:
        server.ask(prompt, ([prompt], ["prompt"]))
        assert server.snapshots.nbytes <= 4.5 * one
    assert server.ask(prompts[0], ([prompts[0]], ["prompt"])).cached
    stats = server.snapshots.stats()
    server.ask(prompts[4], ([prompts[4]], ["prompt"]))
    assert server.snapshots.stats()["evictions"] > stats["evictions"]
    found = [server.snapshots.fetch_nearest_cache("m", p)[0] is not None for p in prompts]
    assert found[0] and found[4] and not found[1]
    server.snapshots.trim_to(n_sequences=0)
    assert len(server.snapshots) == server.snapshots.nbytes == 0


def test_nothing_is_kept_where_nothing_may_be(served):
    server = served(Snapshots(0))
    assert [server.ask(words(60)).cached for _ in range(2)] == [0, 0]
    assert server.snapshots.stats()["misses"] == 2


def test_what_is_large_is_cut_to_its_budget(served):
    server = served(settings=EXACT)
    server.ask(words(300), ([words(300)[:-1], words(300)[-1:]], ["user", "prompt"]), n=1)
    whole = server.snapshots.nbytes
    small = served(Snapshots(2 * whole), like=server)
    small.ask(words(300), ([words(300)[:-1], words(300)[-1:]], ["user", "prompt"]), n=1)
    assert 0 < small.snapshots.nbytes < whole
    assert small.ask([*words(300)[:-1], *words(5, seed=9)]).cached == 299
    assert small.ask([*words(290), *words(5, seed=9)]).cached == 0


def test_one_that_can_be_taken_back_stands_for_shorter_ones(served):
    server = served(settings=None)
    prompt = words(80)
    server.ask(prompt, ([prompt[:30], prompt[30:60], prompt[60:]], ["system", "user", "prompt"]))
    kinds = server.snapshots.stats_by_type()
    assert set(kinds) == {"system", "assistant"}  # what many begin with stays
    assert server.ask([*prompt[:60], *words(9, seed=7)]).cached == 60


def test_a_layer_that_has_a_state_can_not_be_taken_back():
    caches = [KVCache(), ArraysCache(1)]
    caches[0].update_and_fetch(mx.zeros((1, 1, 9, 4)), mx.zeros((1, 1, 9, 4)))
    caches[1][0] = mx.zeros((1, 4))
    snapshots = Snapshots(LARGE)
    snapshots.insert_cache("m", list(range(9)), caches)
    assert snapshots.fetch_nearest_cache("m", list(range(8)))[0] is None
    assert snapshots.fetch_nearest_cache("m", list(range(9)))[1] == list(range(9))
    found, rest = snapshots.fetch_nearest_cache("m", list(range(11)))
    assert rest == [9, 10] and found[0].offset == 9


# On disk.


def stored(folder, **options):
    return Snapshots(LARGE, SnapshotStore(folder, options.get("max_bytes", LARGE)))


def talk(server, n=90, seed=2):
    turn, tail = words(n, seed), [7]
    answer = server.ask([*turn, *tail], ([turn, tail], ["user", "prompt"]))
    return turn, answer.tokens


def test_a_turn_survives_a_restart(served, tmp_path):
    server = served(stored(tmp_path), settings=EXACT)
    turn, answer = talk(server)
    prompt = [*turn, *answer, *words(20, seed=9)]
    server.snapshots.close()
    again = served(stored(tmp_path), like=server)
    asked = again.ask(prompt)
    assert asked.cached == 90 and again.snapshots.stats()["loaded"] == 1
    caches = make_prompt_cache(server.model)
    feed(server, caches, turn)
    server.patch.prune(caches)
    feed(server, caches, prompt[90:-1])
    logits = server.model(mx.array([prompt[-1:]]), cache=caches)[0, -1]
    assert mx.abs(logits - asked.logits[0]).max().item() < 1e-4
    again.snapshots.close()


@pytest.mark.parametrize("harm", ["cut", "flipped", "garbage", "other settings", "empty", "header"])
def test_a_file_that_does_not_fit_is_left_alone(served, tmp_path, caplog, harm):
    server = served(stored(tmp_path), settings=EXACT)
    turn, answer = talk(server)
    server.snapshots.close()
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    harmed = {
        "cut": data[: len(data) // 2],
        "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "garbage": b"\x08" + bytes(7) + b"{nothing" + data[300:],
        "empty": b"",
        "header": data[:8] + b"[" * (len(data) - 8),
        "other settings": data,
    }[harm]
    path.write_bytes(harmed)
    settings = {**EXACT, "top_k": 40} if harm == "other settings" else EXACT
    server.patch.restore()
    with caplog.at_level(logging.WARNING):
        again = served(stored(tmp_path), settings=settings, model=server.model)
        assert again.ask([*turn, *answer, *words(20, seed=9)]).cached == 0
        again.snapshots.close()
    assert path.read_bytes() == harmed
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and str(path) in lines[0] and "\n" not in lines[0]


def test_files_are_bounded_and_the_oldest_go(served, tmp_path):
    server = served(stored(tmp_path), settings=EXACT)
    talk(server)
    server.snapshots.close()
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    server.patch.restore()
    again = served(stored(tmp_path, max_bytes=int(2.5 * size)), settings=EXACT, model=server.model)
    for seed in range(20, 24):
        talk(again, seed=seed)
        time.sleep(0.05)
    again.snapshots.close()
    files = {p.name for p in tmp_path.iterdir()}
    assert len(files) == 3 and "notes.safetensors" in files
    assert again.snapshots.store.nbytes <= 2.5 * size


def test_a_folder_that_can_not_be_is_told(tmp_path, served):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="can't be used.*--store"):
        served(stored(tmp_path / "file" / "folder"))


# Where prompts are cut.


@pytest.fixture(scope="module")
def tokenizer():
    return load_preset("tiny").tokenizer


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, THINKS])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be short."}]])
def test_cuts_are_where_later_prompts_begin_alike(tokenizer, template, system):
    options = {} if template is None else {"chat_template": template}
    ask = [*system, {"role": "user", "content": "What is it?"}]
    later = [*ask, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And this?"}]
    prompt, more, other = (
        tokenizer.apply_chat_template(m, add_generation_prompt=True, **options)
        for m in (ask, later, [*system, {"role": "user", "content": "Why?"}])
    )
    segments, kinds = segments_of(tokenizer, prompt, ask, options)
    assert sum(segments, []) == prompt and kinds == ["system"] * len(system) + ["user", "prompt"]
    ends = np.cumsum([len(s) for s in segments])
    turn = ends[kinds.index("user")]
    assert more[:turn] == prompt[:turn]
    if template is None:
        assert turn == len(prompt) - 1  # something is left to read
    else:
        assert tokenizer.decode(prompt[turn:]).startswith("<think>")
        assert more[: turn + 1] != prompt[: turn + 1]
    if system:
        assert other[: ends[0]] == prompt[: ends[0]] and other[ends[0]] != prompt[ends[0]]


def test_a_template_that_fails_cuts_nothing(tokenizer):
    prompt = words(30)
    broken = {"chat_template": "{{ raise_exception('no') }}"}
    assert segments_of(tokenizer, prompt, [{"role": "user", "content": "x"}], broken) == ([prompt], ["prompt"])


def test_long_prompts_are_not_encoded_again(tokenizer, monkeypatch):
    asked = [{"role": "user", "content": "word " * 2000}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, chat_template=THINKS)
    seen = []
    inner = type(tokenizer._tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer._tokenizer), "encode", lambda self, text, **o: seen.append(text) or inner(self, text, **o)
    )
    segments_of(tokenizer, prompt, asked, {"chat_template": THINKS})
    assert sum(map(len, seen)) < 100


def test_what_is_kept_takes_the_memory_that_it_is_counted_for():
    """A cache has room to grow, which a copy would keep."""
    preset = load_preset("tiny")
    with patch_sparse_generate(preset.model, preset.indexers, **vars(preset.config)):
        caches = make_prompt_cache(preset.model)
        preset.model(mx.array([list(range(600))]), cache=caches)
        kept = [cache.copy() for cache in caches]
        hold(kept)
        del caches
        gc.collect()
        mx.synchronize()
        with_them, n_bytes = mx.get_active_memory(), sum(cache.nbytes for cache in kept)
        del kept
        gc.collect()
        assert with_them - mx.get_active_memory() < 1.05 * n_bytes
