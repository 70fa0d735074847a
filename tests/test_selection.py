"""Which keys each query attends to, against sets written down in NumPy."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, feed, feed_calls, layer_of, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from probe import Probe, clear_probe
from simulate import MARGIN, generate_calls, whole_calls

from mlx_dsa import ops, patch_sparse_generate
from mlx_dsa.selection import plan_evicted, select_evicted, select_kept, select_topk
from numpy_reference import ReferenceModel, Rules


def sets_of(slots):
    """Return one set a row of [R, K] slots, without the empty ones."""
    rows = [[s for s in row if s >= 0] for row in slots.tolist()]
    assert all(len(set(row)) == len(row) for row in rows)
    return [set(row) for row in rows]


def tied_scores(rows, length, seed):
    """Scores with many exact ties, zeros above all, of both signs."""
    noise = np.random.default_rng(seed)
    scores = np.round(noise.standard_normal((rows, length)) * 2) / 2
    scores[noise.random((rows, length)) < 0.4] = 0.0
    scores[noise.random((rows, length)) < 0.1] = -0.0
    return scores.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("top_k, n_sink, n_recent", [(1, 0, 1), (8, 0, 1), (8, 4, 4), (16, 3, 5), (64, 4, 8)])
def test_select_topk(top_k, n_sink, n_recent, tied, seed):
    rows, length = 40, 57
    noise = np.random.default_rng(seed)
    scores = noise.standard_normal((rows, length)).astype(np.float32)
    if tied:
        scores = tied_scores(rows, length, seed)
    n_visible = noise.integers(1, length + 1, rows)
    slots = select_topk(mx.array(scores)[None], top_k, mx.array(n_visible), n_sink, n_recent)
    rules = Rules(top_k=top_k, n_sink=n_sink, n_recent=n_recent)
    positions = np.arange(length)
    expected = [rules.select(positions, row, seen - 1) for row, seen in zip(scores, n_visible)]
    assert slots.dtype == mx.int32 and slots.shape == (1, rows, top_k)
    assert sets_of(slots[0]) == expected


@pytest.mark.parametrize("low", [-1e30, -np.finfo(np.float32).max])
def test_select_topk_never_sees_the_future(low):
    # A finite fill value would lose to it, or draw with it.
    scores = np.full((1, 4, 32), low, np.float32)
    scores[:, :, 16:] = np.finfo(np.float32).max
    slots = select_topk(mx.array(scores), 8, mx.array([3, 8, 9, 16]), 2, 2)
    assert sets_of(slots[0]) == [
        {0, 1, 2},
        set(range(8)),
        {0, 1} | set(range(3, 9)),
        {0, 1} | set(range(10, 16)),
    ]


def test_on_equal_scores_the_newer_key_wins():
    scores = mx.zeros((1, 1, 50))
    slots = select_topk(scores, 10, mx.array([50]), 2, 3)
    assert sets_of(slots[0]) == [{0, 1} | set(range(42, 50))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("evict", ["index", "window"])
def test_select_kept(evict, seed):
    rules = Rules(top_k=16, n_sink=3, n_recent=5, evict=evict)
    scores = tied_scores(2, 41, seed)
    slots = select_kept(mx.array(scores) if evict == "index" else None, 41, 16, n_sink=3, n_recent=5)
    positions = np.arange(41)
    expected = [rules.prune(positions, row, newest=40) for row in scores]
    assert sets_of(mx.broadcast_to(slots, (2, 16))) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("evict", ["index", "window"])
@pytest.mark.parametrize("n_sink, n_recent", [(0, 1), (3, 5), (8, 8)])
def test_select_evicted(n_sink, n_recent, evict, seed):
    """Slots in any order, holding old positions with gaps."""
    rules = Rules(top_k=16, n_sink=n_sink, n_recent=n_recent, evict=evict)
    noise = np.random.default_rng(seed)
    newest, rows = 60, 6
    recent = list(range(newest - n_recent + 1, newest))
    others = np.arange(n_sink, newest - n_recent + 1)
    positions = []
    for _ in range(rows):
        old = noise.choice(others, 16 - n_sink - len(recent), replace=False)
        positions.append(noise.permutation([*range(n_sink), *old, *recent]))
    positions = np.array(positions)
    scores = tied_scores(rows, 16, seed)
    slots = select_evicted(
        mx.array(scores) if evict == "index" else None,
        mx.array(positions.astype(np.int32)),
        newest,
        n_sink,
        n_recent,
    )
    for row in range(rows):
        everything = np.append(positions[row], newest)
        all_scores = np.append(scores[row], 0.0)
        order = np.argsort(everything)
        stays = rules.drop_one(everything[order], all_scores[order], newest)
        (gone,) = set(everything.tolist()) - stays
        assert positions[row, slots[row].item()] == gone


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("offset", [0, 37])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("scaled", [False, True])
def test_scores_of_an_indexer(kind, scaled, offset, norm):
    """`scores` of a bound indexer, with the scale, for cached keys and a chunk.

    RoPE is the layer's own: mlx-lm's qwen3_moe builds it without any scaling.
    """
    model = make_model(kind, **(SHAPES["yarn"] if scaled else {}))
    indexer = make_indexers(model, norm=norm)[0]
    reference = ReferenceModel(model, {0: indexer}).indexers[0]
    x = np.random.default_rng(0).standard_normal((offset + 9, 64))
    positions = np.arange(offset + 9)
    queries = reference.queries(x[offset:], positions[offset:])
    expected = reference.scores(*queries, reference.keys(x, positions))

    bound = indexer.bind(layer_of(model), mx.float32)
    inputs = mx.array(x.astype(np.float32))[None]
    keys = bound.project_keys(inputs, 0)
    assert keys.shape == (1, 1, offset + 9, 12)
    scores = bound.scores(inputs[:, offset:], keys, offset)
    assert scores.shape == (1, 9, offset + 9) and scores.dtype == mx.float32
    assert np.abs(np.array(scores[0]) - expected).max() < 5e-6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("retention_dim", [0, 5])
def test_projections_at_once_are_those_one_by_one(norm, retention_dim):
    model = make_model()
    indexer = make_indexers(model, norm=norm, retention_dim=retention_dim)[0]
    before = dict(tree_flatten(indexer.parameters()))
    plain = indexer.bind(layer_of(model), mx.float32, fused=False)
    fused = indexer.bind(layer_of(model), mx.float32)
    x = mx.random.normal((2, 9, 64))
    expected = [plain.project_keys(x, 7), *plain.project_queries(x, 7)]
    # Other sums of the same products: the last bits may differ.
    same = partial(np.allclose, rtol=0, atol=1e-5)
    assert all(map(same, fused.project(x, 7), expected))
    assert all(map(same, [fused.project_keys(x, 7), *fused.project_queries(x, 7)], expected))
    if retention_dim:
        entries = plain.project_keys(x, 7), plain.retention(x)
        assert all(map(same, fused.project_entries(x, 7), entries))
        assert all(map(same, plain.project_entries(x, 7), entries))
    for owner in (indexer, fused):
        after = dict(tree_flatten(owner.parameters()))
        assert after.keys() == before.keys()
        assert all(mx.array_equal(after[name], before[name]) for name in before)


def test_a_bound_indexer_takes_no_more_memory():
    model = make_model(hidden=512)
    indexer, layer = make_indexers(model)[0], layer_of(model)
    size = sum(a.nbytes for _, a in tree_flatten(indexer.parameters()))
    mx.synchronize()
    before = mx.get_active_memory()
    for _ in range(3):
        fused = indexer.bind(layer, mx.float32)
        mx.eval(fused.project(mx.zeros((1, 1, 512))), fused.parameters(), indexer.parameters())
    assert mx.get_active_memory() - before < size / 3  # rows to multiples of 8


# From here on: the sets of the patched attention itself.


# A small share of the keys too: they are gathered where others are masked.
@pytest.mark.parametrize("top_k, n_sink, n_recent", [(24, 3, 5), (5, 1, 2), (1, 0, 1)])
@pytest.mark.parametrize("chunk", [160, 64, 7, 1])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1)])
def test_exact_sets_for_every_chunk(heads, kv_heads, chunk, top_k, n_sink, n_recent):
    rules = dict(top_k=top_k, n_sink=n_sink, n_recent=n_recent, cache="full", prefill="exact")
    probe, expected = clear_probe([160], rules, heads=heads, kv_heads=kv_heads)
    assert probe.program(whole_calls(160, chunk), **rules) == expected
    assert all(len(expected[p]) == min(p + 1, top_k) for p in expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("n_heads, head_dim, rope_dim", [(1, 4, 2), (6, 69, 64), (4, 32, 16), (2, 16, 16)])
def test_exact_sets_for_indexer_shapes(n_heads, head_dim, rope_dim, norm):
    rules = dict(SMALL_RULES, cache="full", prefill="exact")
    shape = dict(n_heads=n_heads, head_dim=head_dim, rope_dim=rope_dim, norm=norm)
    probe, expected = clear_probe([120], rules, **shape)
    assert probe.program([64, 56], **rules) == expected


@pytest.mark.parametrize("top_k", [24, 29, 32])
@pytest.mark.parametrize("calls", [[160], [64, 64, 32], [16] * 10, [33, 40, 87], [5] * 32, [9, 90, 61]])
def test_tile_sets(calls, top_k):
    rules = dict(SMALL_RULES, top_k=top_k, cache="full", prefill="tile", tile_size=16)
    probe, expected = clear_probe(calls, rules)
    assert probe.program(calls, **rules) == expected


def test_tile_sets_do_not_depend_on_multiples_of_a_tile():
    rules = dict(SMALL_RULES, cache="full", prefill="tile", tile_size=16)
    probe, expected = clear_probe([160], rules)
    for chunk in (16, 32, 48, 144):
        assert probe.program(whole_calls(160, chunk), **rules) == expected


@pytest.mark.parametrize("top_k, resolved", [(23, "exact"), (24, "tile")])
def test_auto_is_tile_where_it_fits(top_k, resolved):
    rules = dict(top_k=top_k, n_sink=3, n_recent=5, tile_size=16, cache="full")
    probe, expected = clear_probe([96], dict(rules, prefill=resolved))
    assert probe.program([96], prefill="auto", **rules) == expected
    other, _ = probe.expected([96], **dict(rules, prefill="dense"))
    assert expected != other


@pytest.mark.parametrize("prefill", ["dense", "exact", "tile"])
@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("evict", ["index", "window"])
def test_decode_sets(cache, prefill, evict):
    rules = dict(SMALL_RULES, cache=cache, prefill=prefill, evict=evict, tile_size=16)
    calls = generate_calls(90, 32, steps=50)
    probe, expected = clear_probe(calls, rules)
    assert probe.program(calls, **rules) == expected


def test_sets_over_two_turns():
    rules = dict(SMALL_RULES, cache="budget", prefill="exact", observation_window=6)
    calls = generate_calls(60, 16, steps=20) + generate_calls(40, 24, steps=20)
    probe, expected = clear_probe(calls, rules)
    assert probe.program(calls, **rules) == expected
    last = expected[sum(calls) - 1]
    assert len(last) == 24 and {0, 1, 2} <= last


def test_rows_of_a_batch_select_for_themselves():
    rules = dict(SMALL_RULES, cache="budget", prefill="exact")
    calls = generate_calls(60, 32, steps=20)
    for seed in range(300):
        probe = Probe(sum(calls), seed=seed, batch=3)
        rows = [probe.expected(calls, row=r, **rules) for r in range(3)]
        if min(margin for _, margin in rows) > MARGIN:
            break
    sets = [s for s, _ in rows]
    assert [probe.program(calls, row=r, **rules) for r in range(3)] == sets
    assert sets[0] != sets[1]


def test_zero_scores_keep_the_newer_keys():
    """An indexer that sees nothing leaves sinks and a window."""
    probe = Probe(96)
    probe.indexers[0].weights_proj.weight *= 0
    for cache in ("budget", "full"):
        sets = probe.program(generate_calls(60, 32, steps=35), **SMALL_RULES, cache=cache, prefill="exact")
        for p, chosen in sets.items():
            window = set(range(max(p - 20, 0), p + 1))
            assert chosen == {s for s in (0, 1, 2) if s <= p} | window, (cache, p)


def test_probe_sees_a_wrong_selection():
    rules = dict(SMALL_RULES, cache="full", prefill="exact")
    probe, expected = clear_probe([96], rules)
    assert probe.program([96], **dict(rules, n_recent=6)) != expected
    probe.indexers[0].wk.weight *= -1
    assert probe.program([96], **rules) != expected


@pytest.mark.parametrize("seed", range(20))
def test_planned_evictions_are_those_of_single_steps(seed):
    noise = np.random.default_rng(seed)
    T = int(noise.integers(4, 70))
    n_sink = int(noise.integers(0, T - 2))
    n_recent = int(noise.integers(1, T - n_sink + 1))
    n_steps = int(noise.integers(1, n_recent + 1))
    scores = tied_scores(3, T, seed)
    if seed % 2:
        scores = noise.standard_normal((3, T)).astype(np.float32)
    rules = (n_steps, n_sink, n_recent)
    planned = plan_evicted(mx.array(scores), T, *rules).tolist()
    oldest = plan_evicted(None, T, *rules).tolist()
    for row, plan in zip([*scores, np.zeros(T)], [*planned, *oldest], strict=True):
        left = set(range(n_sink, T))
        for step, slot in enumerate(plan):
            candidates = [s for s in left if s <= T - n_recent + step]
            assert slot == min(candidates, key=lambda s: (row[s], s))
            left.remove(slot)


@pytest.mark.parametrize("cache", ["budget", "full", "tiered"])
@pytest.mark.parametrize("evict", ["index", "keydiff", "window"])
@pytest.mark.parametrize("prefill", ["exact", "tile"])
def test_a_backend_that_is_asked_for_is_obeyed_everywhere(monkeypatch, cache, evict, prefill):
    """In prompts, in decode and where a prompt is pruned."""
    model, asked = make_model(), []
    own = ops.choose
    monkeypatch.setattr(ops, "choose", lambda *a: asked.append((a[1], a[0])) or own(*a))
    rules = dict(top_k=24, n_sink=3, n_recent=5, tile_size=16, prefill=prefill)
    for backend in ("reference", "auto"):
        with patch_sparse_generate(model, make_indexers(model), **rules, cache=cache, evict=evict, backend=backend):
            feed(model, make_tokens(60), 56)
            feed_calls(model, make_tokens(80), [60] + [1] * 20, make_prompt_cache(model))
        assert {which for _, which in asked} == {backend}
        assert "select_topk" in {name for name, _ in asked}
        asked.clear()
