"""Compact positions beside the NumPy reference, which rotates every key when it attends to it."""

import numpy as np
import pytest
from builders import SHAPES, feed_calls, make_model, make_text, with_heads
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS, difference, generate_calls, kept_positions, run_reference

from mlx_dsa import patch_sparse_generate
from numpy_reference import ReferenceModel
from numpy_reference.model import LayerCache, ReferenceRun

ORDERS = ("retention", "blend", "keydiff", "index", "window")
RULES = dict(n_sink=3, observation_window=8, positions="compact")
# stream_chunk, top_k, n_recent, tokens of a call: plans of 5 and 9 steps, and none.
SIZES = ((16, 24, 5, 32), (10, 32, 9, 7), (32, 40, 3, 200))
# Two turns; an answer of several plans, the last of them cut short by a question.
TURNS = ((66, 23), (37, 12))


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    indexers = with_heads(model)
    return model, indexers, ReferenceModel(model, indexers)


def rules_for(evict, prefill, size):
    chunk, top_k, n_recent, step = size
    rules = dict(evict=evict, prefill=prefill, stream_chunk=chunk, top_k=top_k, n_recent=n_recent)
    calls = [n for length, steps in TURNS for n in generate_calls(length, step, steps)]
    return {**RULES, **rules}, calls


def run_program(model, indexers, rules, tokens, calls):
    """Return the logits of each call, and after each the positions and the numbers that are kept."""
    logits, kept, numbers, start = [], [], [], 0
    with patch_sparse_generate(model, indexers, **rules):
        cache = make_prompt_cache(model)
        for n in calls:
            (out,) = feed_calls(model, tokens[:, start : start + n], [n], cache)
            start += n
            logits.append(np.array(out[0], np.float64))
            kept.append([kept_positions(c) for c in cache])
            numbers.append([sorted(c.numbers[0].tolist()) for c in cache])
    return logits, kept, numbers


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prefill", ["dense", "exact", "stream"])
@pytest.mark.parametrize("evict", ORDERS)
def test_reading_decode_and_turns_are_the_reference(small, evict, prefill, size):
    model, indexers, reference = small
    rules, calls = rules_for(evict, prefill, size)
    tokens, run, expected, stays = run_reference(reference, rules, calls, make=make_text)
    logits, kept, numbers = run_program(model, indexers, rules, tokens, calls)
    assert difference(logits, expected) < LOGITS
    assert kept == stays
    assert numbers[-1] == [sorted(c.numbers.tolist()) for c in run.caches]
    # What the comparison would see: keys that stay where they stood.
    absolute = {**rules, "positions": "absolute"}
    other, *_ = run_program(model, indexers, absolute, tokens, calls)
    assert difference(other, expected) > 100 * LOGITS


@pytest.mark.parametrize("shape", ["gqa4-untied", "yarn", "moe"])
@pytest.mark.parametrize("evict", ["retention", "keydiff"])
def test_other_shapes_and_scaled_rope_are_the_reference(shape, evict):
    model = make_model(**SHAPES[shape], vocab=1024)
    indexers = with_heads(model)
    rules, calls = rules_for(evict, "stream", SIZES[0])
    tokens, _, expected, stays = run_reference(ReferenceModel(model, indexers), rules, calls, make=make_text)
    logits, kept, _ = run_program(model, indexers, rules, tokens, calls)
    assert difference(logits, expected) < LOGITS and kept == stays


@pytest.mark.parametrize("prefill", ["dense", "exact", "stream"])
@pytest.mark.parametrize("evict", ["retention", "blend", "keydiff"])
def test_orders_that_are_decided_early_are_the_reference_with_absolute_positions(small, evict, prefill):
    model, indexers, reference = small
    for size in SIZES:
        rules, calls = rules_for(evict, prefill, size)
        rules["positions"] = "absolute"
        tokens, _, expected, stays = run_reference(reference, rules, calls, make=make_text)
        logits, kept, _ = run_program(model, indexers, rules, tokens, calls)
        assert difference(logits, expected) < LOGITS and kept == stays


def never_in(name):
    """Return a change of the reference: one of its methods numbers nothing anew."""

    def change(monkeypatch):
        of = getattr(ReferenceRun, name)

        def without(self, cache, i):
            before, cache.renumber = cache.renumber, lambda: None
            of(self, cache, i)
            cache.renumber = before

        monkeypatch.setattr(ReferenceRun, name, without)

    return change


def counted_from_the_text(monkeypatch):
    def renumber(self):  # new tokens keep their places
        self.numbers = np.arange(len(self.positions))

    monkeypatch.setattr(LayerCache, "renumber", renumber)


@pytest.mark.parametrize("wrong", [never_in("_plan"), never_in("_prune"), counted_from_the_text])
def test_other_ways_to_number_are_seen(small, wrong, monkeypatch):
    model, indexers, reference = small
    rules, calls = rules_for("window", "stream", SIZES[0])
    tokens, _, expected, _ = run_reference(reference, rules, calls, make=make_text)
    logits, *_ = run_program(model, indexers, rules, tokens, calls)
    assert difference(logits, expected) < LOGITS
    wrong(monkeypatch)
    _, _, expected, _ = run_reference(reference, rules, calls, make=make_text)
    assert difference(logits, expected) > 100 * LOGITS
