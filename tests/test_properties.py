"""What must hold for any settings, cuts and damages: cases that hypothesis makes up, and makes small."""

import mlx.core as mx
import numpy as np
import pytest
from builders import feed_calls, make_indexers, make_model, make_text, with_heads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS, difference, make_small, run_program, run_reference
from test_cuts import kept, same

from mlx_dsa import load_indexers, patch_sparse_generate, save_indexers

# The same cases in every run: a new fault is found by a change of code, not by luck.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tests")


@st.composite
def budgets(draw):
    """Return a budget with its sinks and newest entries."""
    top_k = draw(st.integers(6, 30))
    n_sink = draw(st.integers(0, 3))
    return {"top_k": top_k, "n_sink": n_sink, "n_recent": draw(st.integers(1, top_k - n_sink - 1))}


@st.composite
def cuts(draw, length):
    """Return the lengths of calls that are one prompt."""
    places = draw(st.sets(st.integers(1, length - 1), max_size=8))
    return np.diff([0, *sorted(places), length]).tolist()


@pytest.fixture(scope="module")
def small():
    return make_small()


@pytest.fixture(scope="module")
def with_retention():
    model = make_model(vocab=1024)
    return model, with_heads(model)


@settings(max_examples=25)
@given(st.data(), budgets(), st.sampled_from(["retention", "keydiff", "window"]))
def test_any_cut_of_a_prompt_keeps_the_same(with_retention, data, budget, evict):
    model, indexers = with_retention
    calls = data.draw(cuts(90))
    text, rest = make_text(90), make_text(4, seed=9)
    with patch_sparse_generate(model, indexers, **budget, evict=evict, prefill="exact") as patch:

        def read(lengths):
            caches = make_prompt_cache(model)
            with patch.reading(caches):
                last = feed_calls(model, text, lengths, caches)[-1][:, -1:]
            steps = feed_calls(model, rest, [1] * 4, caches)
            return np.array(mx.concatenate([last, *steps], axis=1)), kept(caches)

        assert same(read(calls), read([90]))


@settings(max_examples=20)
@given(budgets(), st.integers(1, 40), st.integers(1, 30), st.integers(0, 12))
@example({"top_k": 6, "n_sink": 0, "n_recent": 5}, 7, 7, 12)
def test_evictions_are_those_of_the_simulation(small, budget, length, chunk, steps):
    model, indexers, reference = small
    rules = {**budget, "prefill": "exact", "observation_window": 8, "evict": "index"}
    calls = [min(chunk, length - start) for start in range(0, length, chunk)] + [1] * steps
    tokens, _, expected, theirs = run_reference(reference, rules, calls)
    logits, ours = run_program(model, indexers, rules, tokens, calls)
    assert ours == theirs and difference(logits, expected) < LOGITS


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_checkpoint_is_refused_in_one_line_or_loads_whole(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    file = folder / "indexers.safetensors"
    if not file.exists():
        save_indexers(folder, make_indexers(make_model()))
        (folder / "whole").write_bytes(file.read_bytes())
    whole = (folder / "whole").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, header - 1), label="at")
    if data.draw(st.booleans(), label="cut short"):
        damaged = whole[:at]
    else:
        new = data.draw(st.binary(min_size=1, max_size=40), label="new")
        damaged = whole[:at] + new + whole[at + len(new) :]
    file.write_bytes(damaged)
    try:
        loaded = load_indexers(file)
    except ValueError as error:
        assert "\n" not in str(error)
    else:  # numbers were changed, or a name into another that may stand there
        assert len(damaged) == len(whole)
        assert damaged[:header] != whole[:header] or sorted(loaded) == [0, 1]


class Pool:
    """Tokens of a conversation, each of which comes once: of two of one, either may be evicted."""

    def __init__(self, tokens):
        self.left = list(tokens)

    def take(self, n):
        return [self.left.pop() for _ in range(n)]

    def __call__(self, logprobs):  # a sampler
        return mx.array(self.take(1))


class Turn:
    """A turn of a conversation in a batch, and the caches of the same conversation alone."""

    def __init__(self, prompt, pool, caches):
        self.prompt, self.pool, self.caches = prompt, pool, caches
        self.tokens, self.logprobs = [], []

    def note(self, response):
        self.tokens.append(response.token)
        self.logprobs.append(np.array(response.logprobs))

    def check(self, model):
        """Compare the answer so far with that of the conversation alone; return what goes on alone."""
        caches = [c.copy() for c in self.caches]
        n, sampler = len(self.tokens), Pool(self.pool.left)
        steps = generate_step(mx.array(self.prompt), model, max_tokens=n, prompt_cache=caches, sampler=sampler)
        tokens, logprobs = zip(*((int(t), np.array(p)) for t, p in steps))
        assert list(tokens) == self.tokens
        assert np.abs(np.stack(logprobs) - np.stack(self.logprobs)).max() < LOGITS
        return caches, Pool(self.pool.left[: -n - 2])


WAYS_OF_BATCHES = {
    "retention": dict(top_k=24),
    "not full": dict(top_k=64, n_recent=16),
    "keydiff": dict(top_k=24, evict="keydiff", positions="compact"),
    "stream": dict(top_k=24, prefill="stream", stream_chunk=16, positions="compact"),
    "full": dict(top_k=24, cache="full"),
    "each step": dict(top_k=24, evict="index"),
}


@pytest.mark.parametrize("way", WAYS_OF_BATCHES)
@settings(max_examples=12)
@given(data=st.data())
def test_rows_that_come_and_go_answer_as_alone(with_retention, way, data):
    """Join, go on, leave in any order, be copied in the middle, take tokens back, and begin another turn."""
    model, indexers = with_retention
    config = {"n_sink": 2, "n_recent": 5, "tile_size": 16, "prefill": "exact", **WAYS_OF_BATCHES[way]}
    with patch_sparse_generate(model, indexers, **config):
        batch, live, idle = BatchGenerator(model, prefill_step_size=16, prefill_batch_size=3), {}, []

        def join(pool, caches=None, alone=None):
            prompt = pool.take(data.draw(st.sampled_from([3, 4, 17, 33, 60]), label="prompt"))
            cut = data.draw(st.integers(1, len(prompt) - 1), label="cut")
            n = data.draw(st.sampled_from([1, 2, 7, 40]), label="n")
            if caches is not None and data.draw(st.booleans(), label="takes back"):
                n_back = data.draw(st.integers(0, min(c.trimmable for c in caches)), label="n_back")
                assert all(c.trim(n_back) == n_back for c in [*caches, *alone])
            segments = [[prompt[:cut], prompt[cut:]]]
            given = None if caches is None else [caches]
            (uid,) = batch.insert_segments(segments, [n], given, [[]], samplers=[Pool(pool.left)])
            live[uid] = Turn(prompt, pool, make_prompt_cache(model) if alone is None else alone)

        for _ in range(data.draw(st.integers(5, 25), label="moves")):
            what = data.draw(st.sampled_from(["join", "turn", "step", "steps", "leave", "copy"]), label="move")
            if what == "join" and len(live) < 6:
                join(
                    Pool(np.random.default_rng(data.draw(st.integers(0, 99), label="seed")).permutation(1024).tolist())
                )
            elif what == "turn" and idle and len(live) < 6:
                caches, alone, pool = idle.pop(data.draw(st.integers(0, len(idle) - 1), label="which"))
                if len(pool.left) > 200:
                    join(pool, caches, alone)
            elif what in ("step", "steps"):
                for _ in range(1 if what == "step" else 12):
                    for response in batch.next()[1]:
                        turn = live[response.uid]
                        turn.note(response)
                        if response.finish_reason is not None:
                            idle.append((response.prompt_cache, *turn.check(model)))
                            del live[response.uid]
            elif what in ("leave", "copy") and live:
                uid = data.draw(st.sampled_from(sorted(live)), label="uid")
                caches = batch.extract_cache([uid])[uid][0]  # also of a prompt half read
                if live[uid].tokens:
                    idle.append((caches, *live[uid].check(model)))
                if what == "leave":
                    batch.remove([uid])
                    del live[uid]
        batch.close()
