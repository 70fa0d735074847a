"""MoA's mixture of windows: sets against NumPy, and how windows are chosen under a budget."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from builders import SMALL_RULES, feed, feed_layer, layer_of, make_model, make_tokens
from calibrations import assert_dense_with_room, calibrations_for, make_calibrations

from mlx_dsa import patch_sparse_generate
from mlx_dsa.calibrate import CalibrateConfig
from mlx_dsa.calibrate.windows import Windows, choose
from mlx_dsa.train.teacher import LayerView
from numpy_reference import rules as expected

NAME = "mixture"
RULES = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=NAME)


def with_windows(model, windows):
    def make(layer, draw):
        alpha, beta = np.array(windows, np.float32).T
        return {"alpha": alpha, "beta": beta}

    return make_calibrations(model, NAME, make)


@pytest.mark.parametrize("calls", [[70], [31, 1, 30] + [1] * 8, [1] * 70])
@pytest.mark.parametrize("windows", [[(9, 0), (-3, 0.25)], [(100, 0), (0, 0)], [(-40, 1), (0, 0.125)], [(2, 0.2)] * 2])
def test_a_patched_layer_attends_to_what_numpy_selects(windows, calls):
    """In prompts and in decode, wherever a text is cut."""
    model = make_model(layers=1)
    layer = layer_of(model)
    x = np.random.default_rng(0).standard_normal((70, 64))
    queries, keys, values, _ = layer.project(mx.array(x[None].astype(np.float32)), 0)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))

    def numpy(windows):
        sets = [
            [
                expected.mixture(n, SMALL_RULES, np.float32(a), np.float32(b)) if n > 24 else set(range(n))
                for n in range(1, 71)
            ]
            for a, b in windows
        ]
        out = mx.array(expected.attention(q, k, v, sets, layer.scale)[None].astype(np.float32))
        return np.array(layer.output(out, None)[0])

    with patch_sparse_generate(model, with_windows(model, windows), **RULES) as patch:
        ours, _ = feed_layer(patch, x, calls)
    assert np.abs(ours - numpy(windows)).max() < 1e-5
    assert np.abs(ours - numpy([(a + 2, b - 0.125) for a, b in windows][::-1])).max() > 1e-2


def test_the_widest_windows_are_the_rule_window():
    model, tokens = make_model(), make_tokens(80)
    logits = []
    for select, windows in ((NAME, [(99, 0)] * 2), ("window", [(99, 0)] * 2), (NAME, [(99, 0), (10, 0)])):
        with patch_sparse_generate(model, with_windows(model, windows), **{**RULES, "select": select}):
            logits.append(np.array(feed(model, tokens, 80)[1]))
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 and np.abs(logits[2] - logits[1]).max() > 1e-3


def test_any_cut_of_a_prompt_gives_one_answer():
    model, tokens = make_model(), make_tokens(70, batch=2)
    with patch_sparse_generate(model, calibrations_for(model, NAME), **RULES):
        answers = [np.array(feed(model, tokens, chunk)[1]) for chunk in (70, 23, 1)]
    assert all(np.abs(a - answers[0]).max() < 1e-4 for a in answers)


def test_tiles_share_the_window():
    model, tokens = make_model(), make_tokens(96)
    rules = dict(RULES, top_k=40, prefill="tile", tile_size=16)
    logits = []
    for select in (NAME, "window", "oracle"):
        with patch_sparse_generate(model, calibrations_for(model, NAME), **{**rules, "select": select}):
            logits.append(feed(model, tokens, 96)[1])
    assert mx.array_equal(logits[0], logits[1]) and not mx.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("cache, evict", [("full", "window"), ("budget", "window"), ("budget", "index")])
def test_room_for_all_is_dense_bit_for_bit(cache, evict):
    assert_dense_with_room(NAME, cache=cache, evict=evict)


# How windows are chosen.


def test_what_a_window_loses_is_the_attention_outside():
    model = make_model(layers=1)
    layer = layer_of(model)
    finder = Windows(CalibrateConfig(sequence_length=150, top_k=24, n_sink=3, n_recent=5, density=0.4))
    x = mx.array(np.random.default_rng(4).standard_normal((1, 150, 64)).astype(np.float32))
    queries, keys, *_ = layer.project(x)
    lost = np.array(finder.measure(layer, LayerView(x, queries, keys, layer.scale))["lost"])
    q, k = (np.array(a[0]).astype(np.float64) for a in (queries, keys))
    assert lost.shape == (2, 35)
    for h, c in itertools.product(range(2), range(35)):
        theirs = []
        for t, query in itertools.product(range(24, 150), q[2 * h : 2 * h + 2]):
            read = list(expected.mixture(t + 1, SMALL_RULES, *finder.candidates[c]))
            paid = np.exp((logits := k[h, : t + 1] @ query[t] * layer.scale) - logits.max())
            theirs.append(1 - paid[read].sum() / paid.sum())
        assert lost[h, c] == pytest.approx(np.mean(theirs), abs=1e-4)


def test_a_candidate_costs_what_it_reads():
    finder = Windows(CalibrateConfig(sequence_length=150, top_k=24, n_sink=3, n_recent=5, density=0.4))
    for (alpha, beta), cost in zip(finder.candidates, finder.costs):
        reads = [len(expected.mixture(n, SMALL_RULES, alpha, beta)) / n for n in (24, 87, 150)]
        assert cost * 0.4 == pytest.approx(reads)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_near_the_best_and_never_over_the_budget(seed):
    draw = np.random.default_rng(seed)
    finder = Windows(CalibrateConfig(sequence_length=150, top_k=24, n_sink=3, n_recent=5, density=0.5))
    some = np.append(draw.permutation(35)[:8], finder.costs.max(axis=1).argmin())
    costs = finder.costs[some]
    # Wider windows lose less, of each head by its own measure.
    lost = np.exp(-costs.mean(axis=1) * draw.uniform(0.2, 3, (5, 1))) * draw.uniform(0.2, 1, (5, 1))
    chosen = choose(lost, costs)
    total = lost[np.arange(5), chosen].sum()
    assert (costs[chosen].mean(axis=0) <= 1 + 1e-6).all()
    best = min(
        lost[np.arange(5), list(every)].sum()
        for every in itertools.product(range(9), repeat=5)
        if (costs[list(every)].mean(axis=0) <= 1).all()
    )
    least = lost[:, -1].sum()  # every head with the narrowest
    assert best - 1e-9 <= total <= best + 0.15 * (least - best)


def test_heads_that_look_far_get_the_wide_windows():
    model = make_model(layers=1)
    layer = layer_of(model)
    finder = Windows(CalibrateConfig(sequence_length=200, top_k=64, n_sink=1, n_recent=4, density=0.2))
    place, length = np.arange(200), 200
    q, k = np.zeros((4, length, 32)), np.zeros((2, length, 32))
    for h, reach in enumerate((3, 60)):  # logits fall with the distance, over so many keys
        q[2 * h : 2 * h + 2, :, 0], k[h, :, 0] = 1, place / reach / layer.scale
    view = LayerView(mx.zeros((1, 200, 64)), *(mx.array(a[None].astype(np.float32)) for a in (q, k)), layer.scale)
    found, told = finder.conclude({0: finder.measure(layer, view)})
    alpha, beta = (np.array(found[0][name]) for name in ("alpha", "beta"))
    near, far = np.clip(np.floor(alpha + beta * 200), 4, 63)
    assert near < 30 < far and (near + far + 2) / 2 <= 0.2 * 200 + 1e-6
    assert "Of 2 key heads" in told[0]
