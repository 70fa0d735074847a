"""What must hold for any settings, cuts and damages: cases that hypothesis makes up, and makes small."""

import mlx.core as mx
import numpy as np
import pytest
from builders import feed_calls, make_indexers, make_model, make_text, with_heads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
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
