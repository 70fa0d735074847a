"""As servers and mlx-lm's tools use a patched model: threads, copies, scores, refusals."""

import copy
import importlib
import sys
import threading
import types
import warnings

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, feed_calls, make_indexers, make_model, make_tokenizer, make_tokens, with_heads
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from test_cuts import RULES, WAYS, kept, same

from mlx_dsa import load_cache, load_preset, patch_sparse_generate, save_cache
from mlx_dsa.evals.generation import take_rows


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"])
    return model, with_heads(model)


def in_thread(function, *arguments):
    """Return what a function returns in a thread of its own, or raise what it raises."""
    result = []

    def run():
        try:
            result.append((function(*arguments), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def turn(model, cache, number):
    """Hold one turn of a conversation; return its log-probabilities."""
    prompt = make_tokens(66 if number == 0 else 30, seed=number)[0]
    steps = generate_step(prompt, model, max_tokens=12, prompt_cache=cache, prefill_step_size=32)
    return np.stack([np.array(p) for _, p in steps])


# Load here, ask there.


@pytest.mark.parametrize("shape", ["gqa2", "yarn", "4bit", "moe"])
@pytest.mark.parametrize("way", WAYS)
def test_four_threads_in_turn(way, shape):
    """A scaled RoPE has frequencies that no list of parameters names."""
    model = make_model(**SHAPES[shape])
    with patch_sparse_generate(model, with_heads(model), **RULES, **WAYS[way]):
        caches = make_prompt_cache(model), make_prompt_cache(model)
        here = [turn(model, caches[0], i) for i in range(4)]
        there = [in_thread(turn, model, caches[1], i) for i in range(4)]
        assert kept(caches[0]) == kept(caches[1])
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(here, there))
    in_thread(lambda: mx.eval(model(make_tokens(5))))  # restored


@pytest.mark.parametrize("way", WAYS)
def test_what_is_pruned_here_goes_on_there(small, way):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES, **WAYS[way]) as patch:
        cache = make_prompt_cache(model)
        with patch.reading(cache):
            mx.eval(model(make_tokens(50), cache=cache))
        in_thread(lambda: mx.eval(model(make_tokens(1), cache=cache)))


@pytest.mark.parametrize("evict", ["retention", "keydiff", "index", "window"])
@pytest.mark.parametrize("n_steps", [0, 5, 20])
def test_what_is_loaded_here_goes_on_there(small, tmp_path, evict, n_steps):
    model, indexers = small
    rules = {**RULES, "top_k": 128, "n_recent": 64, "evict": evict}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, make_tokens(200), [150, 1] + [1] * n_steps, cache)
        save_cache(tmp_path / "a.kv", cache, patch)
        loaded = load_cache(tmp_path / "a.kv", patch).caches
        in_thread(lambda: mx.eval(model(make_tokens(1), cache=loaded)))


@pytest.mark.parametrize("evict", ["retention", "index"])
def test_a_preset_loaded_here_answers_there(evict):
    model, tokenizer, indexers, config = load_preset("tiny", evict=evict)
    prompt = tokenizer.encode("The password of the mill is marigold. " * 40)

    def ask():
        return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=4)]

    dense = in_thread(ask)
    with patch_sparse_generate(model, indexers, **vars(config)):
        assert len(in_thread(ask)) == len(dense) == 4


def test_a_lazy_array_of_another_thread_fails():
    """Why the tests above could fail."""
    lazy = mx.zeros(3) + 1
    with pytest.raises(RuntimeError, match="Stream"):
        in_thread(mx.eval, lazy)


# Copies, as mlx-lm's server makes them at every stored prompt that fits.

STORES = {
    **WAYS,
    "tiered-8": dict(cache="tiered", cold_bits=8),
    "file": dict(cache="tiered", cold_file=...),
}


def rules_of(way, tmp_path):
    given = {k: str(tmp_path / "cold") if v is ... else v for k, v in STORES[way].items()}
    return {**RULES, "prefill": "exact", **given}


@pytest.mark.parametrize("before", [[40], [60, 1], [60] + [1] * 9, [60] + [1] * 9 + [70]])
@pytest.mark.parametrize("way", STORES)
def test_a_copy_goes_on_by_itself(small, tmp_path, way, before):
    model, indexers = small
    tokens, other = make_tokens(200), make_tokens(60, seed=5)
    calls = [1] * 8 + [12] + [1] * 6
    with patch_sparse_generate(model, indexers, **rules_of(way, tmp_path)):

        def start():
            cache = make_prompt_cache(model)
            feed_calls(model, tokens, before, cache)
            return cache

        def go_on(cache, text):
            return np.array(mx.concatenate(feed_calls(model, text, calls, cache), axis=1))

        expected = [(go_on(c, text), kept(c)) for text in (tokens, other) for c in [start()]]
        first = start()
        second = copy.deepcopy(first)
        third = copy.deepcopy(second)
        results = [(go_on(c, t), kept(c)) for c, t in ((second, other), (first, tokens), (third, other))]
    for result, i in zip(results, (1, 0, 1)):
        assert same(result, expected[i])


@pytest.mark.parametrize("way", STORES)
def test_a_stored_prompt_of_mlx_lms_server(small, tmp_path, way):
    """Its store copies what fits, and the second turn gives what it would have given."""
    model, indexers = small
    store = LRUPromptCache(max_size=4)
    with patch_sparse_generate(model, indexers, **rules_of(way, tmp_path)):
        cache = make_prompt_cache(model)
        turn(model, cache, 0)
        key = list(range(78))
        store.insert_cache("model", key, cache)
        found, rest = store.fetch_nearest_cache("model", [*key, 5, 6])
        assert rest == [5, 6] and found is not cache
        assert np.array_equal(turn(model, found, 1), turn(model, cache, 1))


@pytest.mark.parametrize("way", STORES)
def test_some_rows_of_a_batch_go_on_as_alone(small, tmp_path, way):
    model, indexers = small
    both = mx.concatenate([make_tokens(60), make_tokens(60, seed=5)])
    with patch_sparse_generate(model, indexers, **rules_of(way, tmp_path)):
        cache = make_prompt_cache(model)
        feed_calls(model, both[:, :50], [40] + [1] * 10, cache)
        rows = take_rows(cache, [1])
        ours = feed_calls(model, both[1:, 50:], [1] * 10, rows)[-1]
        theirs = feed_calls(model, both[:, 50:], [1] * 10, cache)[-1]
    assert mx.abs(ours - theirs[1:]).max() < 1e-4


def test_a_copy_does_not_stay_in_what_was_said_of_another(small):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        cache = make_prompt_cache(model)
        with patch.reading(cache):
            feed_calls(model, make_tokens(40), [40], cache)
            copies = [copy.deepcopy(cache), [c.copy() for c in cache]]
        for other in copies:
            patch.prune(other)
            feed_calls(model, make_tokens(10), [1] * 10, other)
            assert [c.size() for c in other] == [24, 24]


@pytest.mark.parametrize("head_dim", [16, 48, 80])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_cold_entries_of_any_head_dim(head_dim, bits):
    model = make_model(head_dim=head_dim)
    indexers, tokens = make_indexers(model), make_tokens(120)
    outputs = {}
    for way in (dict(cache="full"), dict(cache="tiered", cold_bits=bits)):
        with patch_sparse_generate(model, indexers, **RULES, **way):
            cache = make_prompt_cache(model)
            calls = [60] + [1] * 30 + [30]
            outputs[way["cache"]] = mx.concatenate(feed_calls(model, tokens, calls, cache), axis=1)
    gap = mx.abs(outputs["full"] - outputs["tiered"]).max()
    assert gap < {4: 8, 8: 1, 16: 1e-4}[bits]


def test_a_cold_file_is_as_large_as_what_it_holds(small, tmp_path):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **rules_of("file", tmp_path)):
        for _ in range(5):
            cache = make_prompt_cache(model)
            feed_calls(model, make_tokens(100), [90] + [1] * 10, cache)
            del cache  # its blocks are used again
        size = (tmp_path / "cold").stat().st_size
    row = 2 * 2 * 32 * 4
    assert 2 * 100 * row < size < 4096 + 2 * (2 * 128 * row)


# Refused in one line.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("begun", [False, True])
def test_speculative_decoding_is_refused(small, way, begun):
    model, indexers = small
    draft = make_model(seed=3)
    prompt = make_tokens(20)[0]
    with patch_sparse_generate(model, indexers, **RULES, **WAYS[way]):
        cache = make_prompt_cache(model)
        if begun:
            feed_calls(model, make_tokens(15), [15], cache)
        steps = stream_generate(
            model, make_tokenizer(), prompt, draft_model=draft, max_tokens=3,
            prompt_cache=cache + make_prompt_cache(draft),
        )  # fmt: skip
        with pytest.raises(ValueError, match="Leave draft_model out"):
            list(steps)


@pytest.mark.parametrize("way, says", [("retention", "lower top_k"), ("full", "'tiered'"), ("tiered", "cold_bits=4")])
def test_kv_bits_is_refused_with_a_reason_that_holds(small, way, says):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES, **WAYS[way]):
        with pytest.raises(ValueError, match=says):
            list(generate_step(make_tokens(20)[0], model, kv_bits=4, quantized_kv_start=0))


# mlx-lm's evaluator.


@pytest.fixture
def scorer(small, monkeypatch):
    """mlx_lm.evaluate's own reader, around a model; its harness is not needed to read."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = object
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda kind: kind
    evaluate = importlib.import_module("mlx_lm.evaluate")
    lm = object.__new__(evaluate.MLXLM)
    lm._model = small[0]
    yield lm
    del sys.modules["mlx_lm.evaluate"]


@pytest.mark.parametrize("way", WAYS)
def test_log_likelihoods_are_those_of_decode(small, scorer, way):
    """As mlx_lm.evaluate reads: a context in chunks, a continuation with a copy."""
    model, indexers = small
    context, text = make_tokens(90)[0], make_tokens(12, seed=4)[0]
    with patch_sparse_generate(model, indexers, **RULES, **WAYS[way], prefill="exact") as patch:
        logprobs, cache = scorer._process_prompt(context, step_size=32)
        scores, _, _ = scorer._score_fn(text[None], cache=copy.deepcopy(cache))
        again, _, _ = scorer._score_fn(text[None], cache=copy.deepcopy(cache))
        assert np.array_equal(np.array(scores), np.array(again))
        own = make_prompt_cache(model)
        feed_calls(model, context[None], [32, 32, 26], own)
        patch.prune(own)
        logits = mx.concatenate(feed_calls(model, text[None, :-1], [1] * 11, own), axis=1)
        expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = mx.take_along_axis(expected, text[None, 1:, None], axis=-1)[..., 0]
    assert mx.abs(scores - expected).max() < 1e-4


def test_rolling_log_likelihoods_of_a_budget_are_refused(small, scorer):
    model, indexers = small
    for way in WAYS:
        with patch_sparse_generate(model, indexers, **RULES, **WAYS[way]) as patch:
            # A stream drops while it reads: a whole text is scored as it would be in a chat.
            if WAYS[way]["cache"] == "budget" and patch.config.prefill != "stream":
                with pytest.raises(ValueError, match="mlx-dsa eval ppl"):
                    scorer._score_fn(make_tokens(60))
            else:
                scorer._score_fn(make_tokens(60))


# Told in one line.


def said(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_half_precision_on_a_cpu_is_told(dtype, monkeypatch):
    model = make_model(dtype=dtype)
    indexers = with_heads(model)
    told = said(lambda: patch_sparse_generate(model, indexers, **RULES).restore())
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert len(told) == (on_cpu and dtype != mx.float32)
    assert all("set_dtype(mx.float32)" in line for line in told)


def test_a_text_beyond_the_positions_is_told_once(small):
    model, indexers = small
    limit = model.args.max_position_embeddings
    with patch_sparse_generate(model, indexers, **RULES):
        cache = make_prompt_cache(model)
        for c in cache:
            c.offset = limit - 2
        told = [said(lambda: feed_calls(model, make_tokens(1), [1], cache)) for _ in range(4)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0]
    assert f"{limit:,} positions" in told[2][0]


@pytest.mark.parametrize("rope_dim", [2, 8, 12])
def test_a_rope_with_a_factor_for_each_dim(rope_dim):
    """longrope: the indexer's pairs take the factors of pairs that turn as fast."""
    factors = [1.0 + i for i in range(16)]
    scaling = dict(
        rope_type="longrope", original_max_position_embeddings=64,
        short_factor=[1.0] * 16, long_factor=factors,
    )  # fmt: skip
    model = make_model(rope_scaling=scaling)
    with patch_sparse_generate(model, make_indexers(model, rope_dim=rope_dim), **RULES) as patch:
        freqs = np.array(patch.layers[0].indexer.rope._freqs)
        mx.eval(model(make_tokens(90)))
    n = rope_dim // 2
    taken = [factors[16 * i // n] for i in range(n)]
    np.testing.assert_allclose(freqs, 10_000 ** (np.arange(n) / n) * taken, rtol=1e-5)
