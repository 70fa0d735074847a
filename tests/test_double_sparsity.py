"""Double Sparsity: its labels and sets against NumPy, and how channels are found."""

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, feed, feed_calls, feed_layer, layer_of, make_model, make_tokens
from calibrations import assert_dense_with_room, calibrations_for
from mlx_lm.models.cache import make_prompt_cache
from simulate import MARGIN, generate_calls

from mlx_dsa import FullKVCache, SparseConfig, patch_sparse_generate
from mlx_dsa.calibrate import CalibrateConfig
from mlx_dsa.calibrate.channels import Channels
from mlx_dsa.rules import make_rule
from mlx_dsa.train.teacher import layer_views
from numpy_reference import rules as expected

NAME = "double_sparsity"


def numpy_layer(model, calibration, x, n, by_head, shift=0):
    """Return the output for hidden states `[L, dim]` by NumPy, and the margin of its sets."""
    layer = layer_of(model)
    queries, keys, values, _ = layer.project(mx.array(x[None].astype(np.float32)), 0)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))
    channels = np.array(calibration.found["channels"])[:, shift : n + shift]
    sets, margin = [], 1.0
    for h in range(len(k)):
        rows = []
        for t in range(len(x)):
            if t < SMALL_RULES["top_k"]:
                rows.append(set(range(t + 1)))
                continue
            heads = [h] if by_head else None
            chosen, m = expected.double_sparsity(q[:, t], k[:, : t + 1], SMALL_RULES, channels, layer.scale, heads)
            rows.append(chosen)
            margin = min(margin, m)
        sets.append(rows)
    out = mx.array(expected.attention(q, k, v, sets, layer.scale)[None].astype(np.float32))
    return np.array(layer.output(out, None)[0]), margin


@pytest.mark.parametrize("shape", ["gqa2", "mha", "mqa"])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("calls", [[70], [31, 1, 30] + [1] * 8])
def test_a_patched_layer_attends_to_what_numpy_selects(shape, by_head, calls):
    """In prompts and in decode, wherever a text is cut."""
    model = make_model(**{**SHAPES[shape], "layers": 1})
    made = calibrations_for(model, NAME)
    n = layer_of(model).head_dim // 8
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal((70, model.args.hidden_size))
        theirs, margin = numpy_layer(model, made[0], x, n, by_head)
        if margin > MARGIN:
            break
    assert margin > MARGIN
    text = f"{NAME}:share=0.125,by_head={str(by_head).lower()}"
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=text)
    with patch_sparse_generate(model, made, **rules) as patch:
        ours, cache = feed_layer(patch, x, calls)
        # The label cache is as large as is told, beside the keys.
        width = patch.layers[0].selecting.entry_width()
        assert width == layer_of(model).n_kv_heads * n and cache.index_keys.shape == (1, 1, 70, width)
    assert np.abs(ours - theirs).max() < 1e-5
    others = numpy_layer(model, made[0], x, n, by_head, shift=n)[0]  # by other channels
    assert np.abs(ours - others).max() > 1e-2


def test_all_channels_are_the_oracle():
    model, tokens = make_model(), make_tokens(80)
    made = calibrations_for(model, NAME)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window")
    logits = []
    for select in (f"{NAME}:share=1", "oracle", f"{NAME}:share=0.5"):
        with patch_sparse_generate(model, made, select=select, **rules):
            logits.append(np.array(feed(model, tokens, 80)[1]))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 and np.abs(logits[2] - logits[1]).max() > 1e-3


@pytest.mark.parametrize("by_head", ["true", "false"])
def test_a_tile_takes_the_largest_of_its_queries_attention(by_head):
    model, tokens = make_model(layers=1), make_tokens(96)
    made, layer = calibrations_for(model, NAME), layer_of(model)
    x = model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    queries, keys, values, _ = layer.project(x)
    q, k = (np.array(a[0]).astype(np.float64) for a in (queries, keys))
    channels = np.array(made[0].found["channels"])[:, :8]
    rules = dict(top_k=40, n_sink=3, n_recent=5, cache="full", prefill="tile", tile_size=16, evict="window")
    with patch_sparse_generate(model, made, select=f"{NAME}:share=0.25,by_head={by_head}", **rules) as patch:
        ours = np.array(patch.layers[0](x, None, patch.make_cache()[0])[0])
    sets = []
    for t in range(96):
        start = t // 16 * 16
        if start + 16 <= 40:
            sets.append(set(range(t + 1)))
            continue
        worth = np.zeros(start)
        for row in range(start, start + 16):
            total = np.zeros(row + 1)
            for h in range(4):
                some = channels[h // 2]
                logits = k[h // 2][: row + 1, some] @ q[h, row, some] * layer.scale
                total += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            worth = np.maximum(worth, total[:start])
        shared = expected.best(worth, expected.forced_of(start, 3, 5), 24)[0]
        sets.append(shared | set(range(start, t + 1)))
    out = expected.attention(q, k, np.array(values[0]).astype(np.float64), [sets, sets], layer.scale)
    theirs = np.array(layer.output(mx.array(out[None].astype(np.float32)), None)[0])
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("by_head", ["true", "false"])
def test_any_cut_of_a_prompt_gives_one_answer(by_head):
    model, tokens = make_model(), make_tokens(70)
    made = calibrations_for(model, NAME)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=f"{NAME}:by_head={by_head}")
    with patch_sparse_generate(model, made, **rules):
        answers = [np.array(feed(model, tokens, chunk)[1]) for chunk in (70, 23, 1)]
    assert all(np.abs(a - answers[0]).max() < 1e-4 for a in answers)
    with patch_sparse_generate(model, made, **dict(rules, n_recent=6)):
        assert np.abs(np.array(feed(model, tokens, 70)[1]) - answers[0]).max() > 1e-4


@pytest.mark.parametrize("cache, evict", [("full", "window"), ("budget", "window"), ("budget", "index")])
def test_room_for_all_is_dense_bit_for_bit(cache, evict):
    assert_dense_with_room(NAME, cache=cache, evict=evict)


def test_a_cold_store_recalls_what_labels_select():
    model, tokens = make_model(), make_tokens(80)
    made = calibrations_for(model, NAME)
    rules = dict(SMALL_RULES, prefill="exact", evict="window", select=NAME)
    logits = []
    for how in (dict(cache="full"), dict(cache="tiered", cold_bits=16)):
        with patch_sparse_generate(model, made, **rules, **how):
            parts = feed_calls(model, tokens, generate_calls(60, 16, 19), make_prompt_cache(model))
            logits.append(np.concatenate([np.array(p) for p in parts], axis=1))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select=f"{NAME}:share=0"), "'share' must be above 0"),
        (dict(select=f"{NAME}:share=1.5"), "at most 1"),
        (dict(select=NAME, positions="compact"), "turn keys"),
        (dict(select=f"{NAME}:by_head=true", cache="tiered"), "of all heads together"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseConfig(**fields)


def test_channels_are_ordered_by_the_products_of_own_queries_and_keys():
    model = make_model(layers=2)
    finder, tokens = Channels(CalibrateConfig()), make_tokens(50)
    for i, view in layer_views(model, tokens, 16):
        layer = layer_of(model, i)
        found = finder.measure(layer, view)
        q, k = (np.array(a[0]).astype(np.float64) for a in (view.queries, view.keys))
        mean = np.stack([np.abs(q[2 * h : 2 * h + 2] * k[h]).sum(0).mean(0) for h in range(2)])
        assert np.allclose(found["products"], mean, atol=1e-5)
        (concluded,), told = finder.conclude({i: found})[0].values(), finder.conclude({i: found})[1]
        order = np.array(concluded["channels"])
        assert (order == np.argsort(-mean, axis=-1)).all() and "sixteenth" in told[0]
        by_keys = np.argsort(-np.abs(k).mean(axis=1), axis=-1)
        assert (order != by_keys).any()
        # What was not turned to its position has other channels.
        flat = layer.project(view.x, 0)
        assert np.allclose(flat.keys, view.keys, atol=1e-5)


def test_calibrated_channels_select_better_than_others():
    """On keys with some large channels, as real models have."""
    draw = np.random.default_rng(0)
    size = np.where(np.arange(32) % 8 == 3, 4.0, 0.3)
    keys = (draw.standard_normal((1, 2, 200, 32)) * size).astype(np.float32)
    queries = (draw.standard_normal((1, 4, 200, 32)) * size**0.5).astype(np.float32)
    model = make_model()
    layer = layer_of(model)
    products = np.abs(queries.reshape(1, 2, 2, 200, 32) * keys[:, :, None]).sum(axis=(0, 2)).mean(axis=1)
    made = calibrations_for(model, NAME)[0]
    read = {}
    for name, order in (("calibrated", np.argsort(-products)), ("others", np.argsort(products))):
        made._channels = mx.array(order.astype(np.int32))
        rule = make_rule("select", f"{NAME}:share=0.125").bind(layer, made)
        cache = FullKVCache()
        labels = rule._of_channels(mx.array(keys), rule._channels).transpose(0, 2, 1, 3).reshape(1, 1, 200, -1)
        cache.append(mx.array(keys), mx.array(keys), labels)
        probe = rule.probe(mx.zeros((1, 200, 64)), 0, mx.array(queries)).rows(199, 200)
        slots = rule.select(probe, cache, 24, mx.array([200]), 200, (1, 1))
        best = expected.oracle(queries[0, :, 199], keys[0], dict(top_k=24, n_sink=1, n_recent=1), layer.scale)[0]
        read[name] = len(set(np.array(slots)[0, 0].tolist()) & best)
    assert read["calibrated"] >= 20 > read["others"]
