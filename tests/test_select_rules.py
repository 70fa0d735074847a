"""Rules of selecting against NumPy: their sets, and what a patched layer makes of them."""

import mlx.core as mx
import numpy as np
import pytest
from builders import (
    SMALL_RULES,
    feed,
    feed_calls,
    feed_layer,
    layer_of,
    make_indexers,
    make_model,
    make_tokens,
    rules_alone,
)
from mlx_lm.models.cache import make_prompt_cache
from probe import Probe
from simulate import MARGIN, generate_calls, whole_calls

from mlx_dsa import FullKVCache, SparseConfig, patch_sparse_generate, sparse_attention
from mlx_dsa.evals.running.watch import Watch
from mlx_dsa.ops import index_scores
from mlx_dsa.rules import Probe as Queries
from mlx_dsa.rules import make_rule
from numpy_reference import rules as expected

SMALL = {
    "quest": "quest:page=4",
    "sparsek": "sparsek:window=6,stride=16",
    "top_p": "top_p:p=0.6",
    "anchor": "anchor:theta=1.5",
    "s2o": "s2o:tau=0.2,block=4",
}
KEYS_ALONE = ("window", "random", "oracle", "quest", "sparsek", "anchor", "hip", "s2o", "dhsa", "power")


def integers(B=2, heads=4, kv_heads=2, length=90, width=8, seed=0):
    """Return queries and keys of small whole numbers: exact sums, and many equal ones."""
    draw = np.random.default_rng(seed)
    shapes = (B, heads, length, width), (B, kv_heads, length, width)
    return [draw.integers(-3, 4, shape).astype(np.float32) for shape in shapes]


def select(text, queries, keys, n_visible, **changes):
    """Return the program's sets: `[B][L]`, or `[B][Hkv][L]`, and the slots."""
    rules = {**SMALL_RULES, **changes}
    rule = make_rule("select", text).bind(layer_of(make_model()))
    cache = FullKVCache()
    cache.append(mx.array(keys), mx.array(keys), None)
    end = max(n_visible)
    rows = mx.array(queries[:, :, [n - 1 for n in n_visible]])
    probe = Queries(rows, mx.ones((len(queries), len(n_visible), 1)))
    forced = rules["n_sink"], rules["n_recent"]
    slots = np.array(rule.select(probe, cache, rules["top_k"], mx.array([*n_visible]), end, forced))
    return sets_of(slots), slots


def sets_of(slots):
    if slots.ndim > 1:
        return [sets_of(part) for part in slots]
    kept = slots[slots >= 0]
    assert (np.diff(kept) > 0).all() and (slots[: len(slots) - len(kept)] == -1).all()
    return set(kept.tolist())


def numpy_sets(make, queries, keys, n_visible, heads=None):
    """Return the sets of a NumPy form for the same queries."""
    return [[make(q[:, n - 1], k[:, :n], heads)[0] for n in n_visible] for q, k in zip(queries, keys)]


@pytest.mark.parametrize("n_visible", [range(25, 91), [90], [40], range(80, 91), [90, 90, 90]])
@pytest.mark.parametrize("page", [1, 4, 7, 16, 200])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1)])
def test_quest_reads_whole_pages_of_the_highest_bounds(heads, kv_heads, page, n_visible):
    queries, keys = integers(heads=heads, kv_heads=kv_heads)

    def make(q, k, some):
        return expected.quest(q, k, SMALL_RULES, page, some)

    shared = select(f"quest:page={page}", queries, keys, n_visible)[0]
    assert shared == numpy_sets(make, queries, keys, n_visible)
    text = f"quest:page={page},by_head=true"
    ours, slots = select(text, queries, keys, n_visible)
    theirs = [numpy_sets(make, queries, keys, n_visible, [h]) for h in range(kv_heads)]
    assert slots.shape == (2, kv_heads, len(n_visible), 24)
    assert ours == [list(of_heads) for of_heads in zip(*theirs)]
    if kv_heads > 1 and page < 16 and len(n_visible) > 3:
        assert theirs[0] != theirs[1]


def test_quest_bounds_what_a_query_pays():
    queries, keys = integers(heads=2, seed=3)
    rule = make_rule("select", "quest:page=8").bind(layer_of(make_model()))
    cache = FullKVCache()
    cache.append(mx.array(keys), mx.array(keys), None)
    n_visible = np.arange(1, 91)
    probe = Queries(mx.array(queries), None)
    bounds = np.array(rule.bounds(probe, cache, mx.array(n_visible), 90))
    paid = np.einsum("bhld,bhtd->bhlt", queries, keys)
    seen = np.arange(90) < n_visible[:, None]
    assert (np.repeat(bounds, 8, axis=-1)[..., :90] >= paid)[:, :, seen].all()
    # What a page's later keys hold is not looked at.
    early, later = rule, keys.copy()
    later[:, :, 43:] = 99
    cache = FullKVCache()
    cache.append(mx.array(later), mx.array(later), None)
    again = np.array(early.bounds(probe, cache, mx.array(n_visible), 90))
    assert (again[:, :, :43, :5] == bounds[:, :, :43, :5]).all()
    assert (again[:, :, 42, 5] == bounds[:, :, 42, 5]).all()
    assert (again[:, :, 50:, 5] != bounds[:, :, 50:, 5]).any()


@pytest.mark.parametrize("n_visible", [range(25, 91), [90]])
@pytest.mark.parametrize("window, stride", [(0, 0), (6, 16), (2, 3), (20, 1), (4, 1000)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
def test_sparsek_reads_a_window_a_stride_and_the_largest_products(heads, kv_heads, window, stride, n_visible):
    queries, keys = integers(heads=heads, kv_heads=kv_heads)

    def make(q, k, some):
        return expected.sparsek(q, k, SMALL_RULES, window, stride, some)

    text = f"sparsek:window={window},stride={stride}"
    assert select(text, queries, keys, n_visible)[0] == numpy_sets(make, queries, keys, n_visible)
    ours = select(f"{text},by_head=true", queries, keys, n_visible)[0]
    theirs = [numpy_sets(make, queries, keys, n_visible, [h]) for h in range(kv_heads)]
    assert ours == [list(of_heads) for of_heads in zip(*theirs)]
    other = select(f"sparsek:window={window + 3},stride=2", queries, keys, n_visible)[0]
    assert other != numpy_sets(make, queries, keys, n_visible)


@pytest.mark.parametrize("n_visible", [range(25, 91), [90], [64, 65]])
@pytest.mark.parametrize("block", [1, 2, 5, 16, 100])
def test_power_reads_distances_that_are_powers_of_two(block, n_visible):
    queries, keys = integers()
    ours = select(f"power:block={block}", queries, keys, n_visible)[0]
    theirs = [expected.power(n, SMALL_RULES, block)[0] for n in n_visible]
    assert ours == [theirs, theirs]
    if block < 100:  # of blocks that reach over everything all is the window
        assert theirs != [expected.power(n, SMALL_RULES, 100)[0] for n in n_visible]
        assert ours[0] != [expected.power(n - 1, SMALL_RULES, block)[0] for n in n_visible]


def test_power_reaches_every_token_in_as_many_layers_as_its_number_has_bits():
    rules = dict(n_sink=0, n_recent=1, top_k=8)
    _, slots = select("power", *integers(length=128), range(1, 129), **rules)
    reads = np.zeros((128, 128), bool)
    for t, row in enumerate(slots[0]):
        reads[t, row[row >= 0]] = True
    reach = [np.linalg.matrix_power(reads.astype(float), n)[127] > 0 for n in range(8)]
    assert reach[7].all() and not reach[4].all()
    # Where a window of as many keys reaches a third of them.
    assert set(select("window", *integers(length=128), [128], **rules)[1][0, 0]) == set(range(120, 128))


@pytest.mark.parametrize("block", [1, 16, 32])
def test_a_tile_reads_whole_tiles_at_distances_that_are_powers_of_two(block):
    rules = dict(n_sink=3, n_recent=5, top_k=80, cache="full", prefill="tile", tile_size=16)
    for calls in ([160], [96, 64], [32] * 5):
        sets = Probe(160).program(calls, select=f"power:block={block}", **rules)
        for tile in range(96, 160, 16):
            wide = max(block, 16)
            powers = {tile // wide - 2**i for i in range(9)}
            forced = expected.forced_of(tile, 3, 5)
            order = sorted(set(range(tile)) - forced, key=lambda s: (s // wide in powers, s), reverse=True)
            shared = forced | set(order[: 64 - len(forced)])
            for t in range(tile, tile + 16):
                assert sets[t] == shared | set(range(tile, t + 1))


@pytest.mark.parametrize("calls", [[60] + [1] * 20, [30, 30] + [1] * 20])
def test_power_with_a_budget_reads_by_the_text_and_then_what_is_kept(calls):
    rules = dict(SMALL_RULES, cache="budget", prefill="exact", evict="window", select="power")
    sets = Probe(80).program(calls, **rules)
    for t in range(24, 61):  # one token ends the prompt
        assert sets[t] == expected.power(t + 1, SMALL_RULES)[0]
    for t in range(61, 80):
        assert sets[t] == expected.forced_of(t + 1, 3, 21)


def top_p_slots(text, seed=0, length=90, sharp=4.0):
    """Return a bound rule, its scores `[L, T]` and its slots for the queries from 25 on."""
    model = make_model()
    rule = make_rule("select", text).bind(layer_of(model), make_indexers(model)[0].bind(layer_of(model)))
    x = mx.random.normal((1, length, 64), key=mx.random.key(seed))
    cache = FullKVCache()
    empty = mx.zeros((1, 2, length, 32))
    cache.append(empty, empty, rule.entry(x, 0))
    probe = rule.probe(x[:, 24:], 24)
    probe = Queries(probe.queries, probe.weights * sharp)
    n_visible = mx.arange(25, length + 1)
    slots = rule.select(probe, cache, 24, n_visible, length, (3, 5))
    return rule, np.array(rule.scores(probe, cache, n_visible, length)[0]), np.array(slots[0])


@pytest.mark.parametrize("p, least", [(0.05, 0), (0.3, 0), (0.6, 1), (0.6, 15), (0.9, 24), (1, 0)])
def test_top_p_reads_as_many_keys_as_reach_the_share(p, least):
    rule, scores, slots = top_p_slots(f"top_p:p={p},least={least}")
    ours, n_clear = sets_of(slots), 0
    for row, (n, chosen) in enumerate(zip(range(25, 91), ours)):
        theirs, margin = expected.top_p(scores[row, :n].astype(np.float64), SMALL_RULES, p, least)
        if margin > 1e-5 or p == 1:
            n_clear += 1
            assert chosen == theirs
        assert len(chosen) >= max(least, 8)
    assert n_clear > 60
    assert rule.mean_read == pytest.approx(np.mean([len(s) for s in ours]))
    if p in (0.3, 0.6) and least < 2:  # some need more than others, some all
        assert len({len(s) for s in ours}) > 3
        wrong = [expected.top_p(scores[r, : r + 25], SMALL_RULES, p + 0.1, least)[0] for r in range(66)]
        assert wrong != ours


def test_slots_of_each_head_are_attended_to_by_its_group():
    draw = np.random.default_rng(0)
    queries, keys, values = (draw.standard_normal((2, h, 30, 8)) for h in (4, 2, 2))
    slots = np.array([[[draw.permutation(30)[:6] for _ in range(30)] for _ in range(2)] for _ in range(2)])
    slots[:, :, ::3, :2] = -1
    sets = [[[set(s[s >= 0].tolist()) for s in h] for h in b] for b in slots]
    theirs = np.stack([expected.attention(*qkv, s, 0.3) for *qkv, s in zip(queries, keys, values, sets)])
    arrays = [mx.array(x.astype(np.float32)) for x in (queries, keys, values)]
    slots = mx.array(slots.astype(np.int32))
    assert np.abs(np.array(sparse_attention(*arrays, slots, scale=0.3)) - theirs).max() < 1e-5
    swapped = sparse_attention(*arrays, slots[:, ::-1], scale=0.3)
    assert np.abs(np.array(swapped) - theirs).max() > 0.1
    with pytest.raises(ValueError, match="topk_indices"):
        sparse_attention(*arrays, slots[:, :1], scale=0.3)


# From here on: through a patched model.


def layer_sets(model, x, make, by_head=False):
    """Return each head's and query's set by NumPy for hidden states `[L, dim]`, and the output."""
    layer = layer_of(model)
    queries, keys, values, _ = layer.project(mx.array(x[None].astype(np.float32)), 0)
    q, k, v = (np.array(a[0]).astype(np.float64) for a in (queries, keys, values))
    sets, margin = [], 1.0
    for h in range(len(k)):
        rows = []
        for t in range(len(x)):
            if t < SMALL_RULES["top_k"]:
                rows.append(set(range(t + 1)))
                continue
            chosen, m = make(q[:, t], k[:, : t + 1], [h] if by_head else None)
            rows.append(chosen)
            margin = min(margin, m)
        sets.append(rows)
    out = expected.attention(q, k, v, sets, layer.scale)
    out = mx.array(out[None].astype(np.float32))
    return np.array(layer.output(out, None)[0]), margin


FORMS = {
    "quest:page=4": lambda q, k, h: expected.quest(q, k, SMALL_RULES, 4, h),
    "quest:page=4,by_head=true": lambda q, k, h: expected.quest(q, k, SMALL_RULES, 4, h),
    "sparsek:window=6,stride=16": lambda q, k, h: expected.sparsek(q, k, SMALL_RULES, 6, 16, h),
    "sparsek:window=6,by_head=true": lambda q, k, h: expected.sparsek(q, k, SMALL_RULES, 6, 128, h),
    "power": lambda q, k, h: expected.power(k.shape[1], SMALL_RULES),
    "power:block=4": lambda q, k, h: expected.power(k.shape[1], SMALL_RULES, 4),
    "oracle": lambda q, k, h: expected.oracle(q, k, SMALL_RULES, 32**-0.5),
}


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("calls", [[70], whole_calls(70, 33), [31, 1, 30] + [1] * 8, [1] * 70])
def test_a_patched_layer_attends_to_what_numpy_selects(text, calls):
    """In prompts and in decode, wherever a text is cut."""
    model = make_model(layers=1)
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal((70, 64))
        theirs, margin = layer_sets(model, x, FORMS[text], "by_head" in text)
        if margin > MARGIN:
            break
    assert margin > MARGIN

    def run(select):
        rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=select)
        with patch_sparse_generate(model, None, **rules) as patch:
            return feed_layer(patch, x, calls)[0]

    assert np.abs(run(text) - theirs).max() < 1e-5
    assert np.abs(run("window") - theirs).max() > 1e-2


@pytest.mark.parametrize("name", rules_alone())
@pytest.mark.parametrize("cache", ["full", "budget"])
def test_a_budget_for_the_whole_text_is_dense_bit_for_bit(name, cache):
    if (name, cache) == ("reuse", "budget"):
        pytest.skip("it is refused")
    model, tokens = make_model(), make_tokens(60)
    calls = generate_calls(40, 16, 19)
    dense = feed_calls(model, tokens, calls, make_prompt_cache(model))
    indexers = None if name in KEYS_ALONE else make_indexers(model)
    rules = dict(n_sink=3, n_recent=5, cache=cache, prefill="exact", evict="window")
    rules["select"] = SMALL.get(name, name)
    for top_k, is_dense in ((60, True), (24, False)):
        with patch_sparse_generate(model, indexers, top_k, **rules):
            ours = feed_calls(model, tokens, calls, make_prompt_cache(model))
        same = [bool(mx.array_equal(a, b)) for a, b in zip(ours, dense)]
        assert all(same) if is_dense else not all(same)


@pytest.mark.parametrize("name", rules_alone())
def test_any_cut_of_a_prompt_gives_one_answer(name):
    model, tokens = make_model(), make_tokens(70)
    indexers = None if name in KEYS_ALONE else make_indexers(model)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window", select=SMALL.get(name, name))
    answers = []
    with patch_sparse_generate(model, indexers, **rules):
        for chunk in (70, 64, 23, 1):
            answers.append(np.array(feed(model, tokens, chunk)[1]))
    assert all(np.abs(a - answers[0]).max() < 1e-4 for a in answers)
    with patch_sparse_generate(model, indexers, **dict(rules, n_recent=6, n_sink=1)):
        assert np.abs(np.array(feed(model, tokens, 70)[1]) - answers[0]).max() > 1e-4


@pytest.mark.parametrize("text", ["quest:page=4,by_head=true", "sparsek:window=6,by_head=true", "top_p"])
def test_tiles_share_a_set_of_every_head(text):
    """Where a rule has sets a head, or of several sizes, tiles have neither."""
    model, tokens = make_model(), make_tokens(90)
    indexers = make_indexers(model)
    rules = dict(SMALL_RULES, top_k=40, cache="full", prefill="tile", tile_size=16, evict="window")
    shared = {"top_p": "lightning"}.get(text, text.replace(",by_head=true", ""))
    logits = []
    for select_ in (text, shared, "window"):
        with patch_sparse_generate(model, indexers, **rules, select=select_):
            logits.append(feed(model, tokens, 90)[1])
    assert mx.array_equal(logits[0], logits[1])
    assert not mx.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("by_head", ["false", "true"])
def test_the_evaluators_see_what_any_head_reads(by_head):
    model, tokens = make_model(layers=1), make_tokens(61)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window")
    rules["select"] = f"quest:page=4,by_head={by_head}"
    queries, keys, *_ = layer_of(model).project(model.layers[0].input_layernorm(model.model.embed_tokens(tokens)), 0)
    q, k = np.array(queries[0, :, 60]).astype(float), np.array(keys[0]).astype(float)
    heads = [[0], [1]] if by_head == "true" else [None]
    read = set().union(*(expected.quest(q, k, SMALL_RULES, 4, h)[0] for h in heads))
    with patch_sparse_generate(model, None, **rules) as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, tokens, [60], cache)
        for slot in range(61):
            watch, copied = Watch(patch, [[(slot, slot + 1)]]), cache[0].copy()
            watch.begin([0])
            feed_calls(model, tokens[:, 60:], [1], [copied])
            watch.finished([0], [copied], [0])
            assert watch.lost[0] == {0: "read" if slot in read else "not selected"}


@pytest.mark.parametrize("select", ["random", "random:seed=5"])
def test_random_draws_the_same_wherever_a_text_is_cut(select):
    rules = dict(SMALL_RULES, cache="full", prefill="exact", select=select)
    probe = Probe(80)
    sets = probe.program([80], **rules)
    assert all(len(sets[p]) == min(p + 1, 24) for p in sets)
    for calls in (whole_calls(80, 31), [50] + [1] * 30, [1] * 80):
        assert probe.program(calls, **rules) == sets
    assert probe.program([80], **dict(rules, select="random:seed=1")) != sets
    # A key is drawn once, for all queries.
    free = [sets[p] - set(range(3)) - set(range(p - 4, p + 1)) for p in (60, 70)]
    assert len(free[0] & free[1]) > 8


def test_window_selects_sinks_and_the_newest():
    rules = dict(SMALL_RULES, cache="full", prefill="exact", select="window")
    sets = Probe(80).program([40] + [1] * 40, **rules)
    for p, chosen in sets.items():
        assert chosen == {s for s in range(3) if s <= p} | set(range(max(p - 20, 0), p + 1))


def test_lightning_through_the_seam_is_its_index_scores():
    model = make_model()
    layer = layer_of(model)
    indexer = make_indexers(model)[0].bind(layer)
    rule = make_rule("select", "lightning").bind(layer, indexer)
    x = mx.random.normal((2, 40, 64), key=mx.random.key(1))
    cache = FullKVCache()
    cache.append(mx.zeros((2, 2, 40, 32)), mx.zeros((2, 2, 40, 32)), rule.entry(x, 0))
    scores = rule.scores(rule.probe(x[:, 30:], 30), cache, mx.arange(31, 41), 40)
    keys, queries = indexer.project_keys(x, 0), indexer.project_queries(x[:, 30:], 30)
    assert mx.array_equal(scores, index_scores(*queries, keys))
    later = indexer.project_queries(x[:, 30:], 31)
    assert not mx.array_equal(scores, index_scores(*later, keys))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select="quest:page=0"), "'page' must be at least 1"),
        (dict(select="quest:page=x"), "'page' must be a whole number"),
        (dict(select="power:block=0"), "'block' must be at least 1"),
        (dict(select="sparsek:window=-1"), "'window' must be at least 0"),
        (dict(select="sparsek", top_k=68), "n_sink \\+ window \\+ 1 = 69"),
        (dict(select="top_p:p=0"), "'p' must be above 0"),
        (dict(select="top_p:p=nan"), "'p' must be above 0"),
        (dict(select="top_p:least=2049"), "'least' must be at most top_k = 2048"),
        (dict(select="quest", cache="tiered"), "reads the keys"),
        (dict(select="top_p", cache="tiered"), "now fewer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseConfig(**{"n_recent": 64, **fields})
