"""mlx-lm's own functions, unmodified, on a patched model."""

import mlx.core as mx
import numpy as np
import pytest
from builders import EXACT, make_indexers, make_model, make_tokenizer, make_tokens
from mlx_lm import generate, stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from simulate import (
    LOGITS,
    MARGIN,
    difference,
    generate_calls,
    run_program,
    run_reference,
)

from mlx_dsa import load_indexers, patch_sparse_generate, save_indexers
from numpy_reference import ReferenceModel, Rules

SMALL = dict(EXACT, evict="index")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def indexers(model):
    return make_indexers(model)


# Layers that stay dense.


@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("layers, dense_layers", [([0, 1, 2], (0,)), ([0, 2], ()), ([1], ()), ([1, 2], (2,))])
def test_dense_layers_are_the_reference(layers, dense_layers, cache):
    model = make_model(layers=3)
    indexers = make_indexers(model, layers=layers)
    rules = dict(SMALL, dense_layers=dense_layers, cache=cache)
    calls = generate_calls(70, 32, 20) + generate_calls(30, 16, 10)
    reference = ReferenceModel(model, indexers)
    tokens, _, expected, kept = run_reference(reference, rules, calls)
    logits, ours = run_program(model, indexers, rules, tokens, calls)
    assert difference(logits, expected) < LOGITS
    assert ours == kept
    sparse = set(layers) - set(dense_layers)
    with patch_sparse_generate(model, indexers, **rules) as patch:
        assert set(patch.layers) == sparse
        kinds = [type(c) is KVCache for c in make_prompt_cache(model)]
        assert kinds == [i not in sparse for i in range(3)]


# mlx-lm on top, as it is.


def greedy(reference, rules, prompt, chunk, steps):
    """Generate in NumPy; return the tokens, the run and the smallest lead."""
    run = reference.start(Rules(**rules))
    start = 0
    for length in generate_calls(len(prompt), chunk, 0):
        logits = run.feed(prompt[start : start + length])[-1]
        start += length
    tokens, lead = [], np.inf
    for _ in range(steps):
        second, first = np.sort(logits)[-2:]
        lead = min(lead, first - second)
        tokens.append(int(logits.argmax()))
        logits = run.feed(tokens[-1:])[-1]
    return tokens, run, lead


@pytest.fixture(scope="module")
def story():
    """A model, a prompt longer than a chunk, and what NumPy answers."""
    model = make_model(tied=False)
    indexers = make_indexers(model)
    reference = ReferenceModel(model, indexers)
    for seed in range(300):
        prompt = make_tokens(150, seed)[0].tolist()
        tokens, run, lead = greedy(reference, SMALL, prompt, 64, 20)
        clear = lead > 1e-3 and min(run.rules.margins) > MARGIN
        if clear and len(set(tokens)) > 5:
            return model, indexers, prompt, tokens, run
    raise AssertionError("no prompt with clear choices")


def test_generate_step(story):
    model, indexers, prompt, expected, run = story
    seen = []
    with patch_sparse_generate(model, indexers, **SMALL):
        cache = make_prompt_cache(model)
        steps = generate_step(
            mx.array(prompt),
            model,
            max_tokens=20,
            prompt_cache=cache,
            prefill_step_size=64,
            prompt_progress_callback=lambda n, total: seen.append((n, total)),
        )
        assert [token for token, _ in steps] == expected
    assert seen == [(0, 150), (64, 150), (128, 150), (149, 150), (150, 150)]
    # mlx-lm has already begun the step after the last token.
    assert [c.offset for c in cache] == [170] * 2
    assert [set(c.positions[0].tolist()) for c in cache] == [run.kept(0), run.kept(1)]


def test_stream_generate_and_generate(story):
    model, indexers, prompt, expected, _ = story
    tokenizer = make_tokenizer()
    options = dict(max_tokens=20, prefill_step_size=64)
    with patch_sparse_generate(model, indexers, **SMALL):
        responses = list(stream_generate(model, tokenizer, prompt, **options))
        text = generate(model, tokenizer, prompt, **options)
    assert [r.token for r in responses] == expected
    assert responses[-1].prompt_tokens == 150
    assert responses[-1].finish_reason == "length"
    assert "".join(r.text for r in responses) == text
    assert text.split() == [f"w{token}" for token in expected]


def test_dense_answers_something_else(story):
    model, indexers, prompt, expected, _ = story
    steps = generate_step(mx.array(prompt), model, max_tokens=20, prefill_step_size=64)
    assert [token for token, _ in steps] != expected


def test_chat_over_two_turns_longer_than_a_chunk(story):
    model, indexers, prompt, expected, _ = story
    second = make_tokens(100, seed=77)[0].tolist()
    with patch_sparse_generate(model, indexers, **SMALL):
        cache = make_prompt_cache(model)
        options = dict(prompt_cache=cache, prefill_step_size=64)
        for text in (prompt, second):
            answer = list(generate_step(mx.array(text), model, max_tokens=9, **options))
            assert len(answer) == 9
            assert all(c.size() == 24 for c in cache)
        assert [c.offset for c in cache] == [150 + 9 + 100 + 9] * 2
        for c in cache:
            kept = set(c.positions[0].tolist())
            assert {0, 1, 2} | set(range(263, 268)) <= kept
            assert kept & set(range(3, 150)) and kept & set(range(159, 259))


def test_model_without_a_cache(model, indexers):
    """As mlx-lm's perplexity calls it: whole texts, nothing evicted."""
    rules = dict(SMALL, top_k=32)
    reference = ReferenceModel(model, indexers)
    tokens, _, expected, _ = run_reference(reference, {**rules, "cache": "full"}, [100])
    with patch_sparse_generate(model, indexers, **rules):
        out = model(tokens)
        assert mx.array_equal(out, model(tokens))
        cache = make_prompt_cache(model)
        assert mx.array_equal(out, model(tokens, cache=cache))
        one = model(tokens[:, :1])
    assert np.abs(np.array(out[0]) - expected[0]).max() < LOGITS
    assert mx.array_equal(one, model(tokens[:, :1]))


def test_published_usage(tmp_path):
    """The lines of the published artefact's model card."""
    model = make_model(kind="qwen3", hidden=64)
    path = tmp_path / "indexers.safetensors"
    shape = dict(n_heads=6, head_dim=69, rope_dim=64)
    save_indexers(path, make_indexers(model, **shape))
    (tmp_path / "run_config.json").unlink()
    prompt = make_tokens(100)[0]

    indexers = load_indexers(str(path), dim=64, proj_dim=69, n_heads=6, rope_dim=64)
    clear_fn = patch_sparse_generate(model, indexers, top_k=2048)
    first = [token for token, _ in generate_step(prompt, model, max_tokens=5)]
    clear_fn()
    second = [token for token, _ in generate_step(prompt, model, max_tokens=5)]
    assert first == second

    assert clear_fn.config.top_k == 2048 and len(clear_fn.layers) == 2
    clear_fn.restore()
    dense = [token for token, _ in generate_step(prompt, model, max_tokens=5)]
    assert first == dense  # 105 tokens are fewer than 2048
