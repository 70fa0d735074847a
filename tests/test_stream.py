"""Prompts that are cut to the budget while they are read (`prefill="stream"`)."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, feed, feed_calls, make_indexers, make_model, make_text, make_tokens, spy_widths, with_heads
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from simulate import (
    LOGITS,
    difference,
    generate_calls,
    run_program,
    run_reference,
    whole_calls,
)
from test_cuts import kept, lengths_for, same
from test_retention import Simulation, first_layer_scores
from test_servers import scorer as scorer

from mlx_dsa import SparseConfig, load_cache, patch_sparse_generate, save_cache
from mlx_dsa.chunks import stream_cuts
from numpy_reference import ReferenceModel

RULES = dict(n_sink=3, n_recent=5, observation_window=8, prefill="stream")
ORDERS = ("retention", "keydiff", "index", "window")
# stream_chunk, top_k: chunks smaller and larger than the budget, and no divisor of it.
SIZES = ((8, 16), (16, 24), (32, 64), (31, 17))


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


@pytest.fixture(scope="module")
def answer(small):
    """Return a function that generates, and tells the log-probabilities and what is kept."""
    model, indexers = small

    @functools.cache
    def run(evict, sizes, length, step, turns=1):
        chunk, top_k = sizes
        rules = {**RULES, "evict": evict, "top_k": top_k, "stream_chunk": chunk}
        with patch_sparse_generate(model, indexers, **rules):
            cache, logprobs = make_prompt_cache(model), []
            for turn in range(turns):
                steps = generate_step(
                    make_text(length, seed=7 + turn)[0],
                    model,
                    max_tokens=5,
                    prompt_cache=cache,
                    prefill_step_size=step,
                )
                logprobs += [np.array(p) for _, p in steps]
        return np.stack(logprobs), kept(cache)

    return run


@pytest.mark.parametrize("evict", ORDERS)
@pytest.mark.parametrize("step", range(1, 65))
def test_every_prefill_step_size_gives_one_answer(answer, evict, step):
    sizes = SIZES[step % len(SIZES)]
    lengths = lengths_for(step)
    for length in lengths if evict == "retention" else lengths[step % 2 :][:1]:
        assert 30 <= length <= 200
        assert same(answer(evict, sizes, length, step), answer(evict, sizes, length, 2048))


@pytest.mark.parametrize("evict", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_later_turns_give_one_answer_too(answer, evict, sizes):
    for length, step in ((66, 32), (60, 7), (38, 2), (95, 16)):
        one = answer(evict, sizes, length, 2048, 2)
        assert same(answer(evict, sizes, length, step, 2), one), step


@pytest.mark.parametrize("evict", ORDERS)
def test_prompts_that_end_beside_a_cut(answer, evict):
    for length in (95, 96, 97, 98):
        one = answer(evict, (16, 24), length, 2048)
        for step in (1, 15, 16, 17, 47, 48):
            assert same(answer(evict, (16, 24), length, step), one), (length, step)


def test_another_chunk_is_another_result(answer):
    """What the comparisons above would see."""
    for evict in ("retention", "keydiff", "index"):
        one = answer(evict, (16, 24), 180, 2048)
        for other in (8, 17, 32):
            found = answer(evict, (other, 24), 180, 2048)
            assert np.abs(found[0] - one[0]).max() > 100 * LOGITS
            assert evict == "retention" or found[1] != one[1]


@pytest.mark.parametrize("evict", ORDERS)
def test_raw_calls_give_one_answer_and_never_hold_more_than_a_chunk_beside_the_budget(small, evict, monkeypatch):
    model, indexers = small
    noise = np.random.default_rng(ORDERS.index(evict))
    tokens, rest = make_text(300), make_text(6, seed=9)
    rules = {**RULES, "evict": evict, "top_k": 24, "stream_chunk": 16}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        seen = spy_widths(patch, monkeypatch)

        def read(calls):
            cache, start, last = make_prompt_cache(model), 0, None
            with patch.reading(cache):
                for n in calls:
                    last = feed_calls(model, tokens[:, start : start + n], [n], cache)[-1][:, -1]
                    start += n
                    assert all(c.size() < 24 + 16 for c in cache)
                    assert all(c.size() <= 24 for c in cache) or start % 16
            steps = feed_calls(model, rest, [1] * 6, cache)
            return np.array(mx.concatenate([last[:, None], *steps], axis=1)), kept(cache)

        expected = read([300])
        assert max(seen) == 24 + 16
        for _ in range(20):
            cuts = np.sort(noise.choice(np.arange(1, 300), noise.integers(1, 12), replace=False))
            cuts = np.unique(np.concatenate([cuts, cuts[:3] + 1, [299]]))
            calls = np.diff([0, *cuts[cuts < 300], 300]).tolist()
            assert same(read(calls), expected), calls
        assert max(seen) == 24 + 16


@pytest.mark.parametrize("shape", ["gqa2", "4bit", "moe"])
def test_dense_bit_for_bit_while_the_budget_holds_all(shape):
    model = make_model(**SHAPES[shape])
    indexers = make_indexers(model, retention_dim=8)
    tokens = make_tokens(260)
    for chunk in (260, 64, 7, 1):
        _, dense = feed(model, tokens, chunk)
        rules = {**RULES, "top_k": 260, "stream_chunk": 16}
        with patch_sparse_generate(model, indexers, **rules):
            cache, read = feed(model, tokens, chunk)
        assert mx.array_equal(read, dense), chunk
        assert all(c.size() == 260 and not c.evicted for c in cache)
        with patch_sparse_generate(model, indexers, **{**rules, "top_k": 259}):
            cache, read = feed(model, tokens, chunk)
        # One entry too many, and no cut left: dense still, and pruned where the prompt ends.
        assert mx.array_equal(read, dense) or chunk == 1
    with patch_sparse_generate(model, indexers, **{**rules, "top_k": 200}):
        _, read = feed(model, tokens, 260)
    assert not mx.array_equal(read, dense)


@pytest.mark.parametrize("evict", ["index", "window"])
@pytest.mark.parametrize("shape", ["gqa2", "gqa4-untied", "moe"])
def test_reading_and_decode_are_the_reference(shape, evict):
    model = make_model(**SHAPES[shape])
    indexers = make_indexers(model)
    reference = ReferenceModel(model, indexers)
    for chunk, top_k, step in ((16, 24, 32), (10, 32, 9), (32, 40, 200)):
        rules = {**RULES, "top_k": top_k, "stream_chunk": chunk, "evict": evict}
        calls = generate_calls(110, step, steps=12) + generate_calls(50, step, steps=6)
        tokens, _, expected, stays = run_reference(reference, rules, calls)
        logits, ours = run_program(model, indexers, rules, tokens, calls)
        assert difference(logits, expected) < LOGITS
        assert ours == stays
        other, _ = run_program(model, indexers, {**rules, "stream_chunk": 14}, tokens, calls)
        assert difference(other, expected) > 100 * LOGITS


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("calls", [[200], [64, 64, 64, 8], [7] * 20 + [60]])
def test_kept_positions_follow_the_scores(small, calls, positions):
    model, indexers = small
    tokens = make_text(sum(calls) + 30)
    scores = first_layer_scores(model, indexers[0], tokens)[0]
    for chunk, top_k in SIZES:
        simulation = Simulation(scores, top_k, 3, 5)
        rules = {**RULES, "top_k": top_k, "stream_chunk": chunk, "positions": positions}
        with patch_sparse_generate(model, indexers, **rules) as patch:
            cache, start = make_prompt_cache(model), 0
            for n in calls:
                with patch.reading(cache) if n == calls[-1] else patch._held(cache, "prompt"):
                    model(tokens[:, start : start + n], cache=cache)
                start += n
            for p in range(start):
                simulation.append(1)
                if (p + 1) % chunk == 0 and len(simulation.kept) > top_k:
                    simulation.prune()
            simulation.prune()
            assert kept(cache)[0] == sorted(simulation.kept)
            for i in range(30):
                model(tokens[:, start + i : start + i + 1], cache=cache)
                simulation.step()
                assert kept(cache)[0] == sorted(simulation.kept)
                if positions == "compact":
                    assert sorted(cache[0].numbers[0].tolist()) == simulation.kept_numbers()


@pytest.mark.parametrize("evict", ORDERS)
def test_a_row_of_a_batch_answers_as_alone(small, evict):
    model, indexers = small
    rules = {**RULES, "evict": evict, "top_k": 24, "stream_chunk": 16}
    calls = generate_calls(90, 40, steps=8) + generate_calls(40, 40, steps=3)
    rows = [make_text(sum(calls), seed) for seed in (1, 2, 3)]

    def run(tokens, row=0):
        return run_program(model, indexers, rules, tokens, calls, row)

    alone = [run(row) for row in rows]
    for i in range(3):
        logits, stays = run(mx.concatenate(rows), i)
        assert difference(logits, alone[i][0]) < LOGITS and stays == alone[i][1]
        assert stays != alone[i - 1][1] or evict == "window"


@pytest.mark.parametrize("evict", ORDERS)
@pytest.mark.parametrize("at", [16, 40, 48, 61])
def test_saved_copied_or_taken_up_in_the_middle_of_a_prompt(small, evict, at, tmp_path):
    model, indexers = small
    tokens = make_text(140)
    rules = {**RULES, "evict": evict, "top_k": 24, "stream_chunk": 16}

    def go_on(cache):
        logits = feed_calls(model, tokens[:, at:], whole_calls(120 - at, 23) + [1] * 20, cache)
        return np.array(mx.concatenate(logits, axis=1)), kept(cache)

    with patch_sparse_generate(model, indexers, **rules) as patch:
        cache = make_prompt_cache(model)
        model(tokens[:, :at], cache=cache)
        path = save_cache(tmp_path / "part", cache, patch)
        copies = [c.copy() for c in cache]
        expected = go_on(cache)
    with patch_sparse_generate(model, indexers, **rules) as patch:
        assert same(go_on(load_cache(path, patch).caches), expected)
        assert same(go_on(copies), expected)


def test_saved_caches_name_how_they_were_cut(small, tmp_path):
    model, indexers = small
    rules = {**RULES, "top_k": 24, "stream_chunk": 16}
    plain = {**rules, "prefill": "dense"}
    paths = {}
    for name, settings in (("stream", rules), ("plain", plain)):
        with patch_sparse_generate(model, indexers, **settings) as patch:
            cache = make_prompt_cache(model)
            model(make_text(50), cache=cache)
            paths[name] = save_cache(tmp_path / name, cache, patch)
    for name, settings, says in (
        ("stream", {**rules, "stream_chunk": 32}, "stream_chunk = 16 but the patch has 32"),
        ("stream", plain, "prefill = stream but the patch has dense"),
        ("plain", rules, "prefill = dense but the patch has stream"),
    ):
        with patch_sparse_generate(model, indexers, **settings) as patch:
            with pytest.raises(ValueError, match=says):
                load_cache(paths[name], patch)
    # Where nothing streams, neither setting decides what is kept.
    other = {**plain, "prefill": "exact", "stream_chunk": 32}
    with patch_sparse_generate(model, indexers, **other) as patch:
        assert load_cache(paths["plain"], patch).tokens == 50


def test_a_trim_before_the_first_cut_leaves_no_trace(small):
    model, indexers = small
    tokens = make_text(100)
    rules = {**RULES, "top_k": 24, "stream_chunk": 32}
    with patch_sparse_generate(model, indexers, **rules):
        results = []
        for first, back in ((28, 0), (31, 3)):
            cache = make_prompt_cache(model)
            model(make_text(first) if not back else tokens[:, :first], cache=cache)
            assert [c.trim(back) for c in cache] == [back] * len(cache)
            logits = feed_calls(model, tokens[:, 28:], [70, 1, 1], cache)
            results.append((np.array(logits[-1]), kept(cache)))
            assert not any(c.is_trimmable() for c in cache)
        assert same(*results)


def test_a_call_without_a_cache_is_a_text_that_is_streamed(small):
    model, indexers = small
    tokens = make_text(90)
    rules = {**RULES, "top_k": 24, "stream_chunk": 16}
    with patch_sparse_generate(model, indexers, **rules) as patch:
        with_cache = model(tokens, cache=make_prompt_cache(model))
        assert mx.array_equal(model(tokens), with_cache)
        cache = make_prompt_cache(model)
        with patch.decoding(cache):
            as_decode = model(tokens, cache=cache)
        assert not np.allclose(as_decode, with_cache, atol=LOGITS)
    with patch_sparse_generate(model, indexers, top_k=24, cache="full", n_recent=5):
        full = make_prompt_cache(model)
    with patch_sparse_generate(model, indexers, **rules):
        with pytest.raises(ValueError, match="keeps all entries"):
            model(tokens, cache=full)


def test_dense_layers_keep_all(small):
    model, indexers = small
    rules = {**RULES, "top_k": 24, "stream_chunk": 16, "dense_layers": (0,)}
    with patch_sparse_generate(model, indexers, **rules):
        cache = make_prompt_cache(model)
        model(make_text(96), cache=cache)
        assert [c.offset for c in cache] == [96, 96] and cache[1].size() == 24


def test_places_of_cuts():
    assert stream_cuts(8, 100, (50, 0, 0)) == []
    assert stream_cuts(8, 16, (50, 0, 0)) == [24, 32, 40, 48]
    assert stream_cuts(8, 16, (8, 40, 16)) == [8]
    assert stream_cuts(8, 16, (7, 40, 16)) == []
    assert stream_cuts(8, 16, (1, 47, 23)) == [1]
    # A later turn, whose cache is not full: the first cut may find room.
    assert stream_cuts(8, 16, (20, 45, 9)) == [11, 19]


def test_a_full_cache_refuses():
    with pytest.raises(ValueError, match="for caches 'budget' and 'tiered', not for 'full'"):
        SparseConfig(cache="full", prefill="stream")


@pytest.mark.parametrize("chunk", [0, -8, 2.0, "8", True, None])
def test_chunks_are_whole_numbers(chunk):
    with pytest.raises(ValueError, match="'stream_chunk' must be a whole number of at least 1"):
        SparseConfig(prefill="stream", stream_chunk=chunk)


def test_without_heads_a_warning_tells_what_is_lost(small):
    model, _ = small
    for prefill, more in (("stream", True), ("dense", False)):
        with pytest.warns(UserWarning, match="no retention head") as found:
            patch_sparse_generate(model, make_indexers(model), prefill=prefill).restore()
        assert ("at every cut" in str(found[0].message)) is more


def test_rolling_log_likelihoods_are_those_of_a_stream(small, scorer):
    """Where a budget pruned once evicts nothing, and is refused."""
    model, indexers = small
    tokens = make_text(90)
    rules = {**RULES, "top_k": 24, "stream_chunk": 16}
    with patch_sparse_generate(model, indexers, **rules):
        scores, _, _ = scorer._score_fn(tokens)
        logits = model(tokens[:, :-1], cache=make_prompt_cache(model))
        expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = mx.take_along_axis(expected, tokens[:, 1:, None], axis=-1)[..., 0]
    assert mx.abs(scores - expected).max() < 1e-4
