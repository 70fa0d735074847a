"""Entries that are numbered anew whenever some are dropped (`positions="compact"`)."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, make_model, make_text, with_heads
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.rope_utils import initialize_rope
from test_cuts import same

from mlx_dsa import load_cache, patch_sparse_generate, save_cache
from mlx_dsa.cache.numbers import Numbers
from mlx_dsa.positions import turn

RULES = dict(SMALL_RULES, observation_window=8, stream_chunk=16)
ORDERS = ("retention", "keydiff", "index", "window")
PREFILLS = ("dense", "tile", "exact", "stream")


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


ROPES = {
    "plain": {},
    "traditional": {"traditional": True},
    "llama3": {
        "scaling_config": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "linear": {"scaling_config": {"rope_type": "linear", "factor": 4.0}},
    "longrope": {
        "scaling_config": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 128,
            "short_factor": 1.0,
            "long_factor": 3.0,
        }
    },
    "yarn": {
        "scaling_config": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def test_a_rope_that_changes_with_the_length_is_refused():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    for layer in model.layers:
        layer.self_attn.rope = initialize_rope(16, 10000.0, False, scaling, 512)
    before = [layer.self_attn for layer in model.layers]
    heads = with_heads(model)
    with pytest.raises(ValueError, match="positions='absolute'"):
        patch_sparse_generate(model, heads, positions="compact", **RULES)
    assert all(layer.self_attn is module for layer, module in zip(model.layers, before))
    with patch_sparse_generate(model, heads, positions="absolute", **RULES):
        model(make_text(40), cache=make_prompt_cache(model))


@pytest.mark.parametrize("dims", (16, 8))
@pytest.mark.parametrize("name", ROPES)
def test_turning_gives_what_another_position_would_have(name, dims):
    options = {"traditional": False, "max_position_embeddings": 512, **ROPES[name]}
    rope = initialize_rope(dims, base=10000.0, **options)
    x = mx.random.normal((2, 3, 40, 16), key=mx.random.key(1))
    starts = np.random.default_rng(0).integers(0, 400, (2, 40))
    ends = np.random.default_rng(1).integers(0, 400, (2, 40))

    def at(positions):
        rows = [
            mx.concatenate([rope(x[b : b + 1, :, i : i + 1], offset=int(p)) for i, p in enumerate(row)], axis=2)
            for b, row in enumerate(positions)
        ]
        return mx.concatenate(rows, axis=0)

    there = turn(rope, at(starts), mx.array(ends - starts, mx.int32))
    assert mx.allclose(there, at(ends), atol=1e-4)
    assert not mx.allclose(at(starts), at(ends), atol=1e-1)
    still = turn(rope, at(starts), mx.zeros((2, 40), mx.int32))
    if isinstance(rope, nn.RoPE):
        assert mx.array_equal(still, at(starts))
    assert mx.allclose(still, at(starts), atol=1e-6)


def test_many_turns_in_16_bits_lose_little():
    """Each is rounded once: the angles themselves are not."""
    rope = initialize_rope(64, base=1e6, traditional=False)
    start = rope(mx.random.normal((1, 2, 64, 64)), offset=4096).astype(mx.bfloat16)
    by = mx.random.randint(-7, 0, (65, 1, 64))
    keys, gaps = start, []
    for i in range(64):
        keys = turn(rope, keys, by[i])
        found = turn(rope, start.astype(mx.float32), by[: i + 1].sum(axis=0))
        gaps.append((mx.linalg.norm(keys - found) / mx.linalg.norm(found)).item())
    assert keys.dtype == mx.bfloat16
    assert 1e-4 < gaps[0] < 0.002 and gaps[-1] < 0.025
    other = turn(rope, start.astype(mx.float32), by.sum(axis=0))  # one turn more
    assert mx.linalg.norm(keys - other) / mx.linalg.norm(other) > 0.1


@pytest.mark.parametrize("dtype", (mx.bfloat16, mx.float16))
def test_keys_of_16_bits_are_not_worn_by_many_numberings(dtype):
    """Entries that live on while two before them go at each of 256 cuts."""
    rope = nn.RoPE(64, base=1e6)
    n, cuts, new = 32, 256, 4
    raw = mx.random.normal((1, 2, 2 * cuts + n + new * cuts, 64), key=mx.random.key(2))

    def places(x):
        return mx.array(x.astype(np.int32))[None]

    def rotated(positions, numbers):
        return turn(rope, raw[:, :, mx.array(positions)], places(numbers))

    def onwards(x, by):
        return turn(rope, x, by)

    numbers, positions = Numbers(), np.arange(2 * cuts + n)
    keys = worn = rotated(positions, positions).astype(dtype)
    for cut in range(cuts):
        offset = 2 * cuts + n + new * (cut + 1)
        more = np.arange(offset - new, offset)
        born = rotated(more, more - numbers.shift).astype(dtype)
        keys, worn = (mx.concatenate([x, born], axis=2) for x in (keys, worn))
        positions = np.concatenate([positions, more])
        slots = np.arange(2, len(positions) - new)
        numbers.take(places(positions), places(slots))
        keys, worn, positions = keys[:, :, 2:-new], worn[:, :, 2:-new], positions[slots]
        worn = turn(rope, worn, places(np.arange(len(slots))) - numbers.of(places(positions)))
        keys = numbers.renew(places(positions), offset, keys, onwards, in_order=True)
        mx.eval(keys, worn)
    exact = rotated(positions, np.arange(n))

    def error(x):
        return (mx.linalg.norm(x.astype(mx.float32) - exact) / mx.linalg.norm(exact)).item()

    assert error(keys) < 2 * error(exact.astype(dtype)) < 0.01
    assert error(worn) > 4 * error(keys)


def first_keys(model, tokens, positions, numbers):
    """Return the first layer's keys `[B, Hkv, n, D]` of some tokens, rotated by numbers."""
    layer = model.layers[0]
    attention = layer.self_attn
    attention = attention.attention if "attention" in attention else attention
    x = layer.input_layernorm(model.model.embed_tokens(tokens))
    B, L, _ = x.shape
    keys = attention.k_proj(x).reshape(B, L, attention.n_kv_heads, -1)
    keys = attention.k_norm(keys).transpose(0, 2, 1, 3)
    keys = mx.take_along_axis(keys, positions[:, None, :, None], axis=2)
    return turn(attention.rope, keys, numbers)


def is_numbered(model, cache, tokens):
    found = first_keys(model, tokens, cache.positions, cache.numbers)
    return mx.allclose(cache.keys, found, atol=1e-4).item()


@pytest.mark.parametrize("evict", ORDERS)
@pytest.mark.parametrize("prefill", PREFILLS)
def test_keys_stand_where_their_numbers_say(small, prefill, evict):
    model, indexers = small
    rules = {**RULES, "evict": evict, "prefill": prefill, "tile_size": 8, "positions": "compact"}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        tokens = mx.concatenate([make_text(203), make_text(203, seed=8)])
        seen = 0

        def check(most):
            first = cache[0]
            order = np.argsort(np.array(first.positions), axis=1)
            numbers = np.take_along_axis(np.array(first.numbers), order, axis=1)
            assert (np.diff(numbers, axis=1) > 0).all()
            assert numbers.max() < most and (numbers[:, 0] == 0).all()
            first.settle(patch.layers[0].eviction.project)
            assert is_numbered(model, first, tokens[:, :seen])
            if first.evicted:
                assert not mx.allclose(
                    first.keys, first_keys(model, tokens[:, :seen], first.positions, first.positions), atol=1e-1
                )

        def feed(n, most):
            nonlocal seen
            model(tokens[:, seen : seen + n], cache)
            seen += n
            check(most)

        for n in (20, 37, 30):  # a stream cuts in them
            feed(n, 87)
        feed(1, 88)
        if prefill == "stream":
            assert cache[0].number < 60
        feed(1, 24 + 8)
        assert cache[0].number == 24 + 1
        for _ in range(40):
            feed(1, 24 + 50)
        if evict != "index":  # whose evictions are not planned
            assert cache[0].number <= 24 + 2 * RULES["n_recent"]
        feed(40, 150)  # another turn
        feed(1, 150)
        feed(1, 24 + 8)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_nothing_dropped_is_the_same_bit_for_bit(small, prefill):
    model, indexers = small

    def run(positions, length):
        rules = {**RULES, "top_k": 64, "prefill": prefill, "tile_size": 8, "positions": positions}
        with patch_sparse_generate(model, indexers, **rules):
            steps = generate_step(make_text(length)[0], model, max_tokens=12)
            return np.stack([np.array(p) for _, p in steps])

    assert np.array_equal(run("absolute", 50), run("compact", 50))
    assert not np.array_equal(run("absolute", 120), run("compact", 120))


@pytest.mark.parametrize("evict", ORDERS)
def test_every_prefill_step_size_gives_one_answer(small, evict):
    model, indexers = small
    rules = {**RULES, "evict": evict, "prefill": "stream", "positions": "compact"}

    def run(step):
        with patch_sparse_generate(model, indexers, **rules):
            cache, logprobs = make_prompt_cache(model), []
            for turn in range(2):
                text = make_text(121, seed=turn)[0]
                steps = generate_step(text, model, max_tokens=9, prompt_cache=cache, prefill_step_size=step)
                logprobs += [np.array(p) for _, p in steps]
            return np.stack(logprobs), [set(c.positions[0].tolist()) for c in cache]

    one = run(2048)
    for step in (7, 15, 16, 17, 40, 120):
        assert same(run(step), one), step


def test_rows_of_a_batch_answer_as_alone(small):
    model, indexers = small
    rules = {**RULES, "prefill": "stream", "positions": "compact"}
    rows = [make_text(90, seed=s) for s in (1, 2)]

    def run(tokens):
        with patch_sparse_generate(model, indexers, **rules) as patch:
            cache = make_prompt_cache(model)
            with patch.reading(cache):
                model(tokens, cache)
            return np.array(mx.concatenate([model(tokens[:, i : i + 1], cache) for i in range(20)], axis=1))

    together = run(mx.concatenate(rows))
    for i, row in enumerate(rows):
        assert np.allclose(together[i], run(row)[0], atol=1e-4)


@pytest.mark.parametrize("n_steps", (0, 3, 11))
def test_copies_and_files_go_on_alike(small, tmp_path, n_steps):
    model, indexers = small
    rules = {**RULES, "prefill": "stream", "positions": "compact"}
    tokens = make_text(150)
    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        with patch.reading(cache):
            model(tokens[:, :90], cache)
        for i in range(90, 90 + n_steps):
            model(tokens[:, i : i + 1], cache)
        path = save_cache(tmp_path / "text.kv", cache, patch)
        loaded, copied = load_cache(path, patch).caches, [c.copy() for c in cache]
        for i in range(100, 140):
            one = model(tokens[:, i : i + 1], cache)
            for other in (loaded, copied):
                assert mx.array_equal(model(tokens[:, i : i + 1], other), one)
    with patch_sparse_generate(model, indexers, **{**rules, "positions": "absolute"}) as patch:
        with pytest.raises(ValueError, match="made with positions = compact"):
            load_cache(path, patch)


def test_a_limit_is_of_numbers(small, recwarn):
    """A stream of any length stays inside the positions of a model, where absolute ones don't."""
    model, indexers = small
    model.args.max_position_embeddings, before = 64, model.args.max_position_embeddings
    try:
        for positions, n in (("compact", 0), ("absolute", 1)):
            rules = {**RULES, "prefill": "stream", "positions": positions}
            with patch_sparse_generate(model, indexers, **rules) as patch:
                cache = make_prompt_cache(model)
                with patch.reading(cache):
                    model(make_text(200), cache)
            assert len([w for w in recwarn if "positions" in str(w.message)]) == n
    finally:
        model.args.max_position_embeddings = before


@pytest.mark.parametrize("cache", ("full", "tiered"))
def test_what_keeps_everything_keeps_its_positions(small, cache):
    with pytest.raises(ValueError, match="compact.*cache 'budget' only"):
        patch_sparse_generate(*small, cache=cache, positions="compact")
