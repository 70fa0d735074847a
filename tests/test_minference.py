"""MInference: the sets of each pattern against NumPy, and how a head's pattern is found."""

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, feed, feed_layer, layer_of, make_model, make_tokens
from calibrations import assert_dense_with_room, make_calibrations
from simulate import MARGIN

from mlx_dsa import SparseConfig, patch_sparse_generate
from mlx_dsa.calibrate import CalibrateConfig
from mlx_dsa.calibrate.patterns import CANDIDATES, Patterns
from mlx_dsa.rules import make_rule
from mlx_dsa.rules.minference import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH
from mlx_dsa.train.teacher import LayerView
from numpy_reference import rules as expected

NAME = "minference"
NAMES = {A_SHAPE: "a", VERTICAL_SLASH: "lines", BLOCK_SPARSE: "blocks"}
TEXT = f"{NAME}:last_q=6,block=5"


def numpy_layer(model, heads, x, calls, last_q=6, block=5):
    """Return the output for hidden states `[L, dim]` by NumPy, and the margin of its sets.

    Args:
        heads: of each key head, its pattern and share.
        calls: lengths; the sparse queries of a call are read together.
    """
    layer = layer_of(model)
    queries, keys, values, _ = layer.project(mx.array(x[None].astype(np.float32)), 0)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))
    group, sets, margin = len(q) // len(k), [], 1.0
    for h, (pattern, share) in enumerate(heads):
        rows, start = [], 0
        for length in calls:
            stop, first = start + length, max(start, min(start + length, SMALL_RULES["top_k"]))
            rows += [set(range(t + 1)) for t in range(start, first)]
            if first < stop:
                part = q[h * group : (h + 1) * group, first:stop], k[h, :stop], range(first + 1, stop + 1)
                found, m = expected.minference(*part, SMALL_RULES, NAMES[pattern], share, last_q, block, layer.scale)
                rows, margin = rows + found, min(margin, m)
            start = stop
        sets.append(rows)
    out = mx.array(expected.attention(q, k, v, sets, layer.scale)[None].astype(np.float32))
    return np.array(layer.output(out, None)[0]), margin


def with_heads(model, heads):
    def make(layer, draw):
        patterns, shares = zip(*heads)
        return {"pattern": np.array(patterns, np.int32), "vertical": np.array(shares, np.float32)}

    return make_calibrations(model, NAME, make)


@pytest.mark.parametrize("calls", [[70], [41, 29], [31, 1, 30] + [1] * 8])
@pytest.mark.parametrize(
    "heads",
    [
        [(A_SHAPE, 0.4), (A_SHAPE, 0.0)],
        [(VERTICAL_SLASH, 0.25), (VERTICAL_SLASH, 0.75)],
        [(BLOCK_SPARSE, 0.0), (BLOCK_SPARSE, 0.0)],
        [(BLOCK_SPARSE, 0.0), (VERTICAL_SLASH, 0.5)],
        [(VERTICAL_SLASH, 1.0), (A_SHAPE, 0.25)],
    ],
)
def test_a_patched_layer_attends_to_what_numpy_selects(heads, calls):
    model = make_model(layers=1)
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal((70, 64))
        theirs, margin = numpy_layer(model, heads, x, calls)
        if margin > MARGIN:
            break
    assert margin > MARGIN

    def run(heads, text=TEXT):
        rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=text)
        with patch_sparse_generate(model, with_heads(model, heads), **rules) as patch:
            return feed_layer(patch, x, calls)[0]

    assert np.abs(run(heads) - theirs).max() < 1e-5
    if heads[0] != heads[1]:  # each head has its own
        assert np.abs(run(heads[::-1]) - theirs).max() > 1e-2
    if heads[0][0] == VERTICAL_SLASH and len(calls) < 3:
        assert np.abs(run(heads, f"{NAME}:last_q=9,block=5") - theirs).max() > 1e-2
    if heads[0][0] == BLOCK_SPARSE:
        assert np.abs(run(heads, f"{NAME}:last_q=6,block=6") - theirs).max() > 1e-2


def test_groups_of_query_heads_share_a_pattern_by_their_mean():
    model = make_model(**{**SHAPES["mqa"], "layers": 1})
    x = np.random.default_rng(1).standard_normal((70, 96))
    theirs, margin = numpy_layer(model, [(VERTICAL_SLASH, 0.5)], x, [70])
    assert margin > MARGIN
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=TEXT)
    with patch_sparse_generate(model, with_heads(model, [(VERTICAL_SLASH, 0.5)]), **rules) as patch:
        ours = np.array(patch.layers[0](mx.array(x[None].astype(np.float32)), None, patch.make_cache()[0])[0])
    assert np.abs(ours - theirs).max() < 1e-5


def test_rows_of_a_batch_select_as_alone():
    model, tokens = make_model(), make_tokens(70, batch=3)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=TEXT)
    for heads in ([(VERTICAL_SLASH, 0.5), (BLOCK_SPARSE, 0)], [(A_SHAPE, 0.4), (VERTICAL_SLASH, 0.1)]):
        with patch_sparse_generate(model, with_heads(model, heads), **rules):
            together = np.array(feed(model, tokens, 70)[1])
            alone = np.concatenate([np.array(feed(model, tokens[i : i + 1], 70)[1]) for i in range(3)])
        assert np.abs(together - alone).max() < 1e-4


def test_where_a_prompt_is_cut_decides_and_a_shape_does_not_ask():
    model, tokens = make_model(), make_tokens(70)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=TEXT)
    for pattern, same in ((A_SHAPE, True), (VERTICAL_SLASH, False), (BLOCK_SPARSE, False)):
        with patch_sparse_generate(model, with_heads(model, [(pattern, 0.5)] * 2), **rules):
            one, other = (np.array(feed(model, tokens, chunk)[1]) for chunk in (70, 23))
        assert (np.abs(one - other).max() < 1e-4) == same


@pytest.mark.parametrize("pattern", NAMES)
def test_a_tile_takes_what_its_heads_pay_in_all(pattern):
    model, tokens = make_model(layers=1), make_tokens(96)
    layer = layer_of(model)
    x = model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    queries, keys, values, _ = layer.project(x)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))
    rules = dict(top_k=40, n_sink=3, n_recent=5, cache="full", prefill="tile", tile_size=16, evict="window")
    made = with_heads(model, [(pattern, 0.5), (A_SHAPE, 0.5)])
    with patch_sparse_generate(model, made, select=TEXT, **rules) as patch:
        ours = np.array(patch.layers[0](x, None, patch.make_cache()[0])[0])
    # Queries 32 to 95 are read together, of which the last 6 are asked for lines.
    worth = np.zeros((96, 96))
    for h in range(2):
        if pattern == VERTICAL_SLASH:
            for t in range(90, 96):
                paid = np.exp((logits := k[0, : t + 1] @ q[h, t] * layer.scale) - logits.max())
                paid /= paid.sum() * 24  # two heads, six queries, two kinds of lines
                worth[:, : t + 1] += paid
                for row in range(96):
                    for s in range(t + 1):
                        if row - (t - s) >= 0:
                            worth[row, row - (t - s)] += paid[s]
        if pattern == BLOCK_SPARSE:
            for t in range(32, 96):
                mean = np.mean([q[h, r] for r in range(32, 96) if r // 5 == t // 5], axis=0)
                if t >= 5:
                    logits = np.array([k[0, 5 * j : 5 * j + 5].mean(0) @ mean for j in range(t // 5)]) * layer.scale
                    paid = np.exp(logits - logits.max())
                    worth[t, : t // 5 * 5] += np.repeat(paid / paid.sum(), 5)
    sets = []
    for t in range(96):
        start = t // 16 * 16
        if start + 16 <= 40:
            sets.append(set(range(t + 1)))
            continue
        largest = worth[start : start + 16, :start].max(axis=0)
        chosen = expected.best(largest, expected.forced_of(start, 3, 5), 24)[0]
        sets.append(chosen | set(range(start, t + 1)))
    out = expected.attention(q, k, v, [sets, sets], layer.scale)
    theirs = np.array(layer.output(mx.array(out[None].astype(np.float32)), None)[0])
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("cache", ["full", "budget"])
def test_room_for_all_is_dense_bit_for_bit(cache):
    assert_dense_with_room(NAME, TEXT, cache=cache, evict="window")


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select=f"{NAME}:last_q=0"), "'last_q' must be at least 1"),
        (dict(select=f"{NAME}:block=0"), "'block' must be at least 1"),
        (dict(select=f"{NAME}:block=99", top_k=96, n_recent=8), "'block' must be at most top_k = 96"),
        (dict(select=NAME, cache="tiered"), "keeps cold"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseConfig(**fields)


# How patterns are found.


def test_a_candidate_is_kept_attention():
    model = make_model(layers=1)
    layer = layer_of(model)
    config = CalibrateConfig(top_k=24, n_sink=3, n_recent=5)
    x = mx.array(np.random.default_rng(4).standard_normal((1, 150, 64)).astype(np.float32))
    queries, keys, *_ = layer.project(x)
    kept = np.array(Patterns(config).measure(layer, LayerView(x, queries, keys, layer.scale))["kept"])
    q, k = (np.array(a[0]).astype(np.float64) for a in (queries, keys))
    rows = np.unique(np.linspace(24, 149, 128).round().astype(int))
    assert len(rows) == 126  # every one that sees more than top_k keys
    for h in range(2):
        for c, (pattern, share) in enumerate(CANDIDATES):
            part = q[2 * h : 2 * h + 2], k[h], range(1, 151), SMALL_RULES, NAMES[pattern], share, 64, 24
            if pattern == BLOCK_SPARSE:
                continue  # its blocks are wider than 24
            sets, _ = expected.minference(*part, layer.scale)
            mass = []
            for t in rows:
                for query in q[2 * h : 2 * h + 2]:
                    paid = np.exp((logits := k[h, : t + 1] @ query[t] * layer.scale) - logits.max())
                    mass.append(paid[list(sets[t])].sum() / paid.sum())
            assert kept[h, c] == pytest.approx(np.mean(mass), abs=1e-4)


def attention_like(kind, draw, length=160, width=32):
    """Return queries and keys `[1, 2, L, D]` whose attention is a pattern: two heads, alike."""
    place, noise = np.arange(length), 0.05 * draw.standard_normal((2, length, width))
    q, k = noise.copy(), noise[::-1].copy()
    if kind == VERTICAL_SLASH:  # a few keys, whoever asks
        q[..., 0], k[:, draw.choice(length, 12), 0] = 30, 6
    if kind == BLOCK_SPARSE:  # queries of a block pay to the blocks of their kind
        of = draw.integers(0, 6, length // 16)[place // 16]
        q[:, place, of], k[:, place, of] = 30, 6
    return (mx.array(a[None].astype(np.float32)) for a in (q, k))


@pytest.mark.parametrize("kind", [VERTICAL_SLASH, BLOCK_SPARSE])
def test_a_heads_pattern_is_found(kind, monkeypatch):
    model = make_model(layers=1)
    layer, draw = layer_of(model), np.random.default_rng(2)
    finder = Patterns(CalibrateConfig(top_k=48, n_sink=1, n_recent=2))
    make = make_rule("select", f"{NAME}:block=16")
    monkeypatch.setattr("mlx_dsa.calibrate.patterns.make_rule", lambda *_: make)
    queries, keys = attention_like(kind, draw)
    view = LayerView(mx.zeros((1, 160, 64)), mx.repeat(queries, 2, axis=1), keys, layer.scale)
    found, told = finder.conclude({0: finder.measure(layer, view)})
    assert found[0]["pattern"].tolist() == [kind, kind] and "2 " in told[0]
    sizes = {name: a.shape for name, a in found[0].items()}
    assert sizes == {"pattern": (2,), "vertical": (2,)}
