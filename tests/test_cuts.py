"""However a prompt is cut into calls, what is kept and what is answered is the same."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, feed_calls, make_model, make_text, with_heads
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS

from mlx_dsa import patch_sparse_generate
from mlx_dsa.cache.prompt import PromptPhase

RULES = dict(SMALL_RULES, observation_window=8, tile_size=16)
WAYS = {
    **{evict: dict(cache="budget", evict=evict) for evict in ("retention", "keydiff", "index", "window")},
    "compact": dict(cache="budget", evict="retention", positions="compact"),
    "full": dict(cache="full"),
    "tiered": dict(cache="tiered", cold_bits=16),
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


@pytest.fixture(scope="module")
def answer(small):
    """Return a function that generates, and tells the log-probabilities and what is kept."""
    model, indexers = small

    @functools.cache
    def run(way, prefill, length, step, turns=1):
        rules = {**RULES, **WAYS[way], "prefill": prefill}
        with patch_sparse_generate(model, indexers, **rules):
            cache, logprobs = make_prompt_cache(model), []
            for turn in range(turns):
                prompt = make_text(length, seed=7 + turn)[0]
                steps = generate_step(prompt, model, max_tokens=5, prompt_cache=cache, prefill_step_size=step)
                logprobs += [np.array(p) for _, p in steps]
        return np.stack(logprobs), kept(cache)

    return run


def kept(cache):
    return [sorted(c.positions[0].tolist()) for c in cache]


def same(one, other):
    return one[1] == other[1] and np.abs(one[0] - other[0]).max() < LOGITS


def lengths_for(step):
    """Return two lengths from 30 to 200: one whose calls end in 1, 1, and any one."""
    k = max(1, -(-28 // step)) + step % 3
    return min(k, 198 // step) * step + 2, 30 + 37 * step % 171


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", range(1, 65))
def test_every_prefill_step_size_gives_one_answer(answer, way, step):
    for length in lengths_for(step):
        assert 30 <= length <= 200
        assert same(answer(way, "exact", length, step), answer(way, "exact", length, 2048))


@pytest.mark.parametrize("way", ["retention", "full", "tiered"])
@pytest.mark.parametrize("prefill", ["dense", "tile"])
def test_other_ways_to_read_give_one_answer_too(answer, way, prefill):
    """In tiles for every size that is a multiple of a tile: the last calls may be 1, 1."""
    for step in (16, 32, 48, 64) if prefill == "tile" else (1, 2, 7, 16, 33, 59):
        for length in {30, 100, 180, *lengths_for(step), 2 * step + 2}:
            one = answer(way, prefill, length, 2048)
            assert same(answer(way, prefill, length, step), one), (step, length)


@pytest.mark.parametrize("way", WAYS)
def test_later_turns_give_one_answer_too(answer, way):
    for length, step in ((66, 32), (60, 7), (38, 2)):
        one = answer(way, "exact", length, 2048, 2)
        assert same(answer(way, "exact", length, step, 2), one), step


def test_comparison_sees_a_prompt_that_ends_too_early(answer, monkeypatch):
    """Without the sign that mlx-lm gives."""
    expected = answer("retention", "exact", 66, 2048)
    monkeypatch.setattr(PromptPhase, "state_was_read", lambda self: None)
    assert not same(answer("retention", "exact", 66, 32 * 2), expected)


@pytest.mark.parametrize("way", WAYS)
def test_raw_calls_give_one_answer_whatever_the_cut(small, way):
    """200 random cuts of 600 tokens over all ways, inside `patch.reading`."""
    model, indexers = small
    noise = np.random.default_rng(list(WAYS).index(way))
    tokens, rest = make_text(600), make_text(6, seed=9)
    with patch_sparse_generate(model, indexers, **RULES, **WAYS[way], prefill="exact") as patch:

        def read(calls):
            cache = make_prompt_cache(model)
            with patch.reading(cache):
                last = feed_calls(model, tokens, calls, cache)[-1][:, -1]
            steps = feed_calls(model, rest, [1] * 6, cache)
            return np.array(mx.concatenate([last[:, None], *steps], axis=1)), kept(cache)

        expected = read([600])
        assert all(len(positions) == (24 if "evict" in WAYS[way] else 606) for positions in expected[1])
        for _ in range(34):
            cuts = np.sort(noise.choice(np.arange(1, 600), noise.integers(1, 12), replace=False))
            # Neighbours too: calls of one token.
            cuts = np.unique(np.concatenate([cuts, cuts[:3] + 1, [599]]))
            calls = np.diff([0, *cuts[cuts < 600], 600]).tolist()
            assert 1 in calls and sum(calls) == 600
            assert same(read(calls), expected), calls


def test_steps_that_read_the_state_stay_within_the_budget(small):
    """A caller who does what mlx-lm does in prompts only."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        cache = make_prompt_cache(model)
        for i, n in enumerate([40, *[1] * 30]):
            mx.eval(model(make_text(n, i), cache=cache), [c.state for c in cache])
        assert [c.size() for c in cache] == [24, 24]


def test_known_text_read_in_one_call_as_decode(small):
    """It gives what single steps give, and evicts as they do."""
    model, indexers = small
    tokens, text = make_text(90), make_text(20, seed=3)
    for way in ("retention", "index", "full", "tiered"):
        with patch_sparse_generate(model, indexers, **RULES, **WAYS[way]) as patch:
            results = []
            for calls in ([1] * 20, [20], [13, 1, 6]):
                cache = make_prompt_cache(model)
                feed_calls(model, tokens, [89, 1], cache)
                with patch.decoding(cache):
                    logits = mx.concatenate(feed_calls(model, text, calls, cache), axis=1)
                results.append((np.array(logits), kept(cache)))
            assert same(results[1], results[0]) and same(results[2], results[0])
            cache = make_prompt_cache(model)
            feed_calls(model, tokens, [89, 1], cache)
            prompt = np.array(feed_calls(model, text, [20], cache)[0]), kept(cache)
            assert not same(prompt, results[0]) or way in ("full", "tiered")


def test_prompt_phases():
    def ends(*events):
        """Return for each call whether it is of the prompt; "s": the state is read."""
        phase = PromptPhase()
        return [
            phase.call(e) for e in events if e != "s" or phase.state_was_read()
        ]  # fmt: skip

    assert ends(8, "s", 1, 1) == [True, True, False]
    assert ends(8, 1, 1) == [True, True, False]
    assert ends(8, "s", 1, "s", 1, 1) == [True, True, True, False]
    assert ends(1, "s", 1, "s", 1, "s", 1, 1) == [True] * 4 + [False]
    assert ends(8, "s", 1, "s", 1, "s", 1, "s", 1) == [True] * 3 + [False] * 2
    assert ends(8, 1, 1, 5, 1, "s", 1, 1) == [True, True, False, True, True, True, False]
