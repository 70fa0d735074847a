"""Selection by an approximate index: what it finds, against the exact rule and NumPy."""

import copy
import sys

import mlx.core as mx
import numpy as np
import pytest
from builders import EXACT, feed_calls, layer_of, make_model, make_tokens
from mlx_lm.models.cache import make_prompt_cache
from test_search import make_projections

from mlx_dsa import FullKVCache, SparseConfig, patch_sparse_generate
from mlx_dsa.rules import Probe, make_rule

ALL = "hnsw:over=100,ef=500"  # so many candidates that none is missed
SETTINGS = dict(EXACT, cache="full")


@pytest.fixture(scope="module")
def model():
    return make_model()


def vectors(length, seed, width=16, B=2, near=0.0):
    """Return unit vectors `[B, length, width]`; by `near` they are gathered in clusters."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((B, length, width))
    centres = draw.standard_normal((8, width))
    x += near * centres[draw.integers(0, 8, (B, length))]
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def cache_of(keys):
    cache = FullKVCache()
    add(cache, keys)
    return cache


def add(cache, keys):
    empty = mx.zeros((len(keys), 2, keys.shape[1], 8))
    cache.append(empty, empty, mx.array(keys)[:, None])


def sets(rule, cache, queries, n_visible, top_k=24, forced=(3, 5)):
    probe = Probe(mx.array(queries)[:, None], mx.ones((*queries.shape[:2], 1)))
    slots = np.array(rule.select(probe, cache, top_k, mx.array([*n_visible]), max(n_visible), forced))
    assert slots.shape == (*queries.shape[:2], top_k)
    for row in slots.reshape(-1, top_k):
        kept = row[row >= 0]
        assert (np.diff(kept) > 0).all() and (row[: top_k - len(kept)] == -1).all()
    return [[set(row[row >= 0].tolist()) for row in part] for part in slots]


def numpy_sets(keys, queries, n_visible, top_k=24, forced=(3, 5)):
    found = []
    for k, q in zip(keys, queries):
        found.append([])
        for row, n in zip(q, n_visible):
            always = {*range(min(forced[0], n)), *range(max(0, n - forced[1]), n)}
            others = sorted(set(range(n)) - always, key=lambda i: (row @ k[i], i), reverse=True)
            found[-1].append(always | set(others[: top_k - len(always)]))
    return found


def rule_of(text, model):
    return make_rule("select", text).bind(layer_of(model))


@pytest.mark.parametrize("n_visible", [range(281, 301), [300], [40, 90, 300], range(2, 30), [1]])
def test_with_enough_candidates_its_sets_are_the_exact_ones(model, n_visible):
    keys, queries = vectors(300, 1), vectors(len(n_visible), 2)
    ours = sets(rule_of(ALL, model), cache_of(keys), queries, n_visible)
    assert ours == numpy_sets(keys, queries, n_visible)
    assert ours != numpy_sets(keys, queries[:, :, ::-1], n_visible) or max(n_visible) < 30


def test_few_candidates_miss_keys_and_more_miss_fewer(model):
    keys, queries, n = vectors(4000, 1, 32), vectors(1, 2, 32), [4000]
    exact = numpy_sets(keys, queries, n, 200)
    recalls = []
    for text in ("hnsw:over=1,ef=1,m=4,build=4", "hnsw", "hnsw:over=4,ef=1000"):
        found = sets(rule_of(text, model), cache_of(keys), queries, n, 200)
        recalls.append(np.mean([len(a[0] & b[0]) / 200 for a, b in zip(found, exact)]))
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[1] > 0.9 and recalls[2] > 0.99


def test_an_index_is_added_to_and_never_built_anew(model):
    keys = vectors(400, 3)
    rule, cache = rule_of(ALL, model), cache_of(keys[:, :100])
    sets(rule, cache, vectors(100, 4), range(1, 101))
    index = cache.companion
    assert index is None or index.size == 0
    for start, stop in ((100, 300), (300, 301), (301, 302), (302, 400)):
        add(cache, keys[:, start:stop])
        queries, n_visible = vectors(stop - start, stop), range(start + 1, stop + 1)
        assert sets(rule, cache, queries, n_visible) == numpy_sets(keys, queries, n_visible)
        # What stands before the queries' call and the newest is in it, and nothing else.
        assert cache.companion.size == start - 5
        index = index if index.size else cache.companion
        assert cache.companion is index


def test_entries_taken_back_are_not_found(model):
    keys, others, queries = vectors(300, 5), vectors(300, 6), vectors(1, 7)
    rule, cache = rule_of(ALL, model), cache_of(keys)
    sets(rule, cache, queries, [300])
    index = cache.companion
    assert cache.trim(200) == 200 and index.size == 100
    add(cache, others[:, :150])
    now = np.concatenate([keys[:, :100], others[:, :150]], axis=1)
    assert sets(rule, cache, queries, [250]) == numpy_sets(now, queries, [250])
    assert numpy_sets(now, queries, [250]) != numpy_sets(keys, queries, [250])
    assert cache.companion is index and index.size == 244


def test_a_copy_goes_on_by_itself(model):
    keys, one, other, queries = vectors(200, 1), vectors(80, 2), vectors(80, 3), vectors(1, 4)
    rule, cache = rule_of(ALL, model), cache_of(keys)
    sets(rule, cache, queries, [200])
    for copied in (copy.deepcopy(cache), cache.copy(), FullKVCache.from_state(cache.state)):
        add(copied, other)
        now = np.concatenate([keys, other], axis=1)
        assert sets(rule, copied, queries, [280]) == numpy_sets(now, queries, [280])
    add(cache, one)
    now = np.concatenate([keys, one], axis=1)
    assert sets(rule, cache, queries, [280]) == numpy_sets(now, queries, [280])


def test_a_graph_does_not_depend_on_cuts_of_the_text(model):
    keys, queries = vectors(1500, 8, 32), vectors(4, 9, 32)
    rule = rule_of("hnsw:over=1,ef=1,m=4,build=4", model)
    found = []
    for cuts in ([1500], [1, 2, 700, 1500], [*range(50, 1501, 50)]):
        cache, start = FullKVCache(), 0
        for stop in cuts:
            add(cache, keys[:, start:stop])
            rule._index(cache, stop)
            start = stop
        found.append(cache.companion.search(queries, 50, 1500))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    exact = np.argsort(-(queries @ keys.swapaxes(1, 2)), axis=-1)[..., :50]
    assert (np.sort(found[0]) != np.sort(exact)).any()


@pytest.mark.parametrize("B", [1, 2])
def test_a_patched_model_gives_what_the_exact_rule_gives(model, B):
    projections = make_projections(model)
    ids = make_tokens(150, seed=3, batch=B)
    outputs = {}
    for select in ("projections", ALL, "hnsw:over=1,ef=1,m=2,build=1"):
        with patch_sparse_generate(model, projections, select=select, **SETTINGS):
            calls = feed_calls(model, ids, [60, 80] + 10 * [1], make_prompt_cache(model))
            outputs[select] = np.concatenate([np.array(c) for c in calls], axis=1)
    exact, ours, poor = outputs.values()
    assert np.abs(ours - exact).max() < 1e-4
    assert np.abs(poor - exact).max() > 1e-3


@pytest.mark.parametrize("cache", ["budget", "tiered"])
def test_other_caches_are_refused(cache):
    with pytest.raises(ValueError, match=r"cache='full', or select='projections'"):
        SparseConfig(select="hnsw", cache=cache, top_k=128)


@pytest.mark.parametrize("option", ["m=1", "build=0", "ef=0", "over=0"])
def test_options_too_small_are_refused(option):
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"option '{name}' must be at least"):
        SparseConfig(select=f"hnsw:{option}", cache="full", top_k=128)


def test_without_usearch_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx-dsa\[hnsw\]'"):
        patch_sparse_generate(model, make_projections(model), select="hnsw", **SETTINGS)


def test_with_room_for_all_it_is_dense_bit_for_bit(model):
    ids = make_tokens(90, seed=5)
    for top_k, same in ((100, True), (24, False)):
        settings = {**SETTINGS, "top_k": top_k, "select": "hnsw"}
        with patch_sparse_generate(model, make_projections(model), **settings):
            ours = np.concatenate(feed_calls(model, ids, [50, 40], make_prompt_cache(model)), axis=1)
        with patch_sparse_generate(model, None, select="window", cache="full", top_k=100, n_recent=5):
            dense = np.concatenate(feed_calls(model, ids, [50, 40], make_prompt_cache(model)), axis=1)
        assert (ours == dense).all() == same
