"""Which entries a budget cache holds after every call, against a simulation."""

import mlx.core as mx
import numpy as np
import pytest
from simulate import (
    LOGITS,
    RULES,
    difference,
    generate_calls,
    make_small,
    run_program,
    run_reference,
)


@pytest.fixture(scope="module")
def small():
    return make_small()


def compare(small, calls, **changes):
    """Hold program and reference together after every call; return the sets."""
    model, indexers, reference = small
    rules = {**RULES, **changes}
    tokens, _, expected, kept = run_reference(reference, rules, calls)
    logits, ours = run_program(model, indexers, rules, tokens, calls)
    assert ours == kept
    assert difference(logits, expected) < LOGITS
    return kept


# Lengths around the budget of 24, and rests of 1 (a call of L = 1 inside the
# prompt, which ends it as far as the cache can tell).
@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize("length", [1, 2, 9, 23, 24, 25, 26, 34, 50, 82])
def test_kept_positions_at_every_step(small, length, chunk):
    calls = generate_calls(length, chunk, steps=40)
    seen = 0
    for call, layers in zip(calls, compare(small, calls), strict=True):
        seen += call
        for kept in layers:
            assert {0, 1, 2} & set(range(seen)) <= kept
            assert set(range(max(seen - 5, 0), seen)) <= kept
            if call == 1:
                assert len(kept) == min(seen, 24)


@pytest.mark.parametrize("evict", ["index", "window"])
@pytest.mark.parametrize("prefill", ["dense", "tile"])
def test_kept_positions_in_every_mode(small, prefill, evict):
    calls = generate_calls(70, 32, steps=30)
    compare(small, calls, prefill=prefill, evict=evict, tile_size=16)


@pytest.mark.parametrize("n_sink, n_recent", [(0, 1), (0, 24), (23, 1), (12, 12)])
def test_kept_positions_at_the_limits_of_the_protected(small, n_sink, n_recent):
    compare(small, generate_calls(60, 32, 30), n_sink=n_sink, n_recent=n_recent)


@pytest.mark.parametrize("observation_window", [1, 2, 500])
def test_observation_window(small, observation_window):
    calls = generate_calls(60, 16, steps=10)
    compare(small, calls, observation_window=observation_window)


def test_window_eviction_is_sinks_and_the_newest(small):
    calls = generate_calls(60, 32, steps=30)
    last = compare(small, calls, evict="window")[-1]
    n = sum(calls)
    assert last == [{0, 1, 2} | set(range(n - 21, n))] * 2


@pytest.mark.parametrize(
    "turns",
    [
        [(60, 20), (50, 20)],
        [(60, 3), (2, 3), (1, 3), (3, 30)],
        [(5, 3), (6, 3), (40, 10)],
        [(30, 0), (30, 0), (30, 5)],
        [(12, 4), (9, 30)],
    ],
)
@pytest.mark.parametrize("observation_window", [8, 500])
def test_turns(small, turns, observation_window):
    """Later prompts are read onto what was kept, then pruned again.

    Only queries of the prompt that ends decide, however few they are.
    """
    calls = []
    for length, steps in turns:
        calls += generate_calls(length, 16, steps)
    kept = compare(small, calls, observation_window=observation_window)
    seen = np.cumsum(calls)
    for n, call, layers in zip(seen, calls, kept):
        assert all(len(k) == min(n, 24) for k in layers) or call > 1


@pytest.mark.parametrize("prefill", ["dense", "tile"])
def test_turns_in_every_mode(small, prefill):
    calls = generate_calls(60, 32, 10) + generate_calls(70, 32, 10)
    compare(small, calls, prefill=prefill, tile_size=16)


def test_prompt_fed_one_token_at_a_time_is_decode(small):
    compare(small, [1] * 60)


def test_rows_of_a_batch_keep_their_own(small):
    model, indexers, reference = small
    calls = generate_calls(40, 32, 20) + generate_calls(20, 32, 10)
    runs = [run_reference(reference, RULES, calls, seed) for seed in (0, 1000)]
    batch = mx.concatenate([run[0] for run in runs])
    assert not mx.array_equal(batch[0], batch[1])
    for row, (_, _, expected, kept) in enumerate(runs):
        logits, ours = run_program(model, indexers, RULES, batch, calls, row)
        assert ours == kept
        assert difference(logits, expected) < LOGITS


def test_simulation_sees_a_wrong_cache(small):
    model, indexers, reference = small
    calls = generate_calls(60, 32, steps=20)
    tokens, _, _, kept = run_reference(reference, RULES, calls)
    for change in (
        dict(n_recent=6),
        dict(observation_window=7),
        dict(evict="window"),
        dict(n_sink=2),
    ):
        _, ours = run_program(model, indexers, {**RULES, **change}, tokens, calls)
        assert ours != kept, change
