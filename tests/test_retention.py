"""Eviction by the retention heads: what is kept, when, and without heads."""

import re
import warnings
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from builders import EXACT, SHAPES, feed_calls, make_indexers, make_model, make_tokens, with_heads
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import (
    SparseConfig,
    load_cache,
    load_indexers,
    patch_sparse_generate,
    save_cache,
    save_indexers,
)
from mlx_dsa.selection import pool_neighbours


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"])
    return model, with_heads(model)


def count_operations(array, tmp_path):
    """Count the operations that are still to run for an array."""
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), array)
    return Counter(re.findall(r'label ="(\w+)", shape=rectangle', file.read_text()))


def first_layer_scores(model, indexer, tokens):
    """Score every token as layer 0 does: its input depends on no other token."""
    x = model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    return np.array(indexer.retention(x), np.float64)


def pool_in_numpy(scores, positions):
    return np.array([max(s for s, q in zip(scores, positions) if abs(q - p) <= 4) for p in positions])


class Simulation:
    """Keep positions as the rules say, a token at a time, and number them if they are compact."""

    def __init__(self, scores, top_k, n_sink, n_recent):
        self.own, self.top_k = scores, top_k
        self.n_sink, self.n_recent = n_sink, n_recent
        self.kept, self.worth, self.offset = [], {}, 0
        self.numbers, self.number, self.planned = {}, 0, 0

    def protected(self, position):
        return position < self.n_sink or position >= self.offset - self.n_recent

    def append(self, n):
        for p in range(self.offset, self.offset + n):
            self.kept.append(p)
            self.worth[p] = self.own[p]
            self.numbers[p] = self.number
            self.number += 1
        self.offset += n

    def read(self, n):
        self.append(n)
        self.planned = 0

    def renumber(self):
        self.numbers = {p: i for i, p in enumerate(sorted(self.kept))}
        self.number = len(self.kept)

    def kept_numbers(self):
        return sorted(self.numbers[p] for p in self.kept)

    def prune(self):
        self.kept.sort()
        pooled = pool_in_numpy([self.own[p] for p in self.kept], self.kept)
        self.worth = dict(zip(self.kept, pooled))
        ranked = sorted(self.kept, key=lambda p: (self.protected(p), self.worth[p], p), reverse=True)
        self.kept = ranked[: self.top_k]
        self.renumber()

    def step(self):
        size = len(self.kept)
        if size == self.top_k and self.n_recent >= 4:
            if not self.planned:  # what they drop is decided now, for as many steps
                self.renumber()
                self.planned = self.n_recent
            self.planned -= 1
        self.append(1)
        if size > self.top_k:
            self.prune()
        elif size == self.top_k:
            candidates = [p for p in self.kept if not self.protected(p)]
            self.kept.remove(min(candidates, key=lambda p: (self.worth[p], p)))


@pytest.fixture(params=[64, 4])
def late(request, monkeypatch):
    """Steps after which what they left open is made: fewer than a plan has, too."""
    monkeypatch.setattr("mlx_dsa.cache.budget._MOST_LATE", request.param)
    monkeypatch.setattr("mlx_dsa.cache.budget._LATE_SHARE", 1)


# Too few recent ones for a plan, plans that end and are cut short, one plan in sight.
@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("n_recent", [3, 4, 5, 12, 21])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("calls", [[60] + [1] * 40, [7] * 8 + [1] * 5 + [30] + [1] * 10])
def test_kept_positions_follow_the_scores(small, calls, n_recent, positions):
    model, indexers = small
    rules = {**EXACT, "n_recent": n_recent, "positions": positions}
    # No token twice: two of one would be worth the same but for rounding, which varies.
    noise = np.random.default_rng(3)
    tokens = mx.array(np.stack([noise.permutation(101)[: sum(calls)] for _ in range(2)]))
    scores = first_layer_scores(model, indexers[0], tokens)
    runs = [Simulation(row, 24, 3, n_recent) for row in scores]
    with patch_sparse_generate(model, indexers, **rules):
        cache, start = make_prompt_cache(model), 0
        for length in calls:
            feed_calls(model, tokens[:, start : start + length], [length], cache)
            start += length
            for row, run in enumerate(runs):
                run.step() if length == 1 else run.read(length)
                assert sorted(cache[0].positions[row].tolist()) == sorted(run.kept)
                numbers = run.kept_numbers() if positions == "compact" else sorted(run.kept)
                assert sorted(cache[0].numbers[row].tolist()) == numbers
                assert numbers == sorted(run.kept) or run.number == cache[0].number
            assert cache[0].offset == start


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("n_recent", [3, 5, 12])
def test_entries_follow_evictions(small, n_recent):
    """A slot holds all that belongs to the position it names, in a plan and after."""
    indexers = {0: small[1][0]}
    model = make_model(layers=1)
    tokens = make_tokens(90, batch=2)
    with patch_sparse_generate(model, indexers, top_k=100, cache="full"):
        full = make_prompt_cache(model)
        feed_calls(model, tokens, [90], full)
    own = first_layer_scores(model, indexers[0], tokens)
    for n_steps in (1, 2, 9, 29):
        with patch_sparse_generate(model, indexers, **{**EXACT, "n_recent": n_recent}) as patch:
            (cache,) = make_prompt_cache(model)
            feed_calls(model, tokens, [60] + [1] * n_steps, [cache])
            patch.prune([cache])  # drops nothing, and makes what steps left open
        positions = np.array(cache.positions)
        assert cache.offset == 60 + n_steps
        for row, at in enumerate(positions):
            for name in ("keys", "values", "index_keys"):
                theirs = np.array(getattr(full[0], name))[row][:, at]
                gap = np.abs(np.array(getattr(cache, name))[row] - theirs)
                assert gap.max() < 1e-5
            assert np.abs(np.array(cache.retention)[row] - own[row, at]).max() < 1e-5


@pytest.mark.usefixtures("late")
def test_a_saved_plan_goes_on_as_if_never_saved(small, tmp_path):
    model, indexers = small
    rest = make_tokens(60, seed=9)
    rules = {**EXACT, "n_recent": 12}
    for n_steps in (0, 1, 7, 12, 13, 24):
        with patch_sparse_generate(model, indexers, **rules) as patch:
            cache = make_prompt_cache(model)
            feed_calls(model, make_tokens(90), [60] + [1] * n_steps, cache)
            save_cache(tmp_path / "a.kv", cache, patch)
            calls = [1] * 15 + [20] + [1] * 5
            expected = mx.concatenate(feed_calls(model, rest, calls, cache), axis=1)
            loaded = load_cache(tmp_path / "a.kv", patch).caches
            again = mx.concatenate(feed_calls(model, rest, calls, loaded), axis=1)
        assert mx.array_equal(expected, again)


def test_a_state_stays_as_it_was(small):
    """Whatever is written in place later, to the cache or to others of the same state."""
    model, indexers = small
    rest = make_tokens(30, seed=9)
    with patch_sparse_generate(model, indexers, **{**EXACT, "n_recent": 12}):
        for n_steps in (0, 1, 3, 12, 14):
            caches = make_prompt_cache(model)
            feed_calls(model, make_tokens(90), [60] + [1] * n_steps, caches)
            states = [c.state for c in caches]
            before = [[np.array(a) for a in s if isinstance(a, mx.array)] for s in states]
            feed_calls(model, rest, [1] * 5, caches)
            for state, arrays in zip(states, before, strict=True):
                now = [a for a in state if isinstance(a, mx.array)]
                assert all(np.array_equal(a, b) for a, b in zip(now, arrays, strict=True))
            answers = []
            for _ in range(2):
                for cache, state in zip(caches, states, strict=True):
                    cache.state = state
                answers.append(mx.concatenate(feed_calls(model, rest, [20] + [1] * 8, caches), 1))
            assert mx.array_equal(*answers)


def test_what_a_planned_step_does_beside_a_dense_one(small, tmp_path):
    """Between plans it has one product in place of three, and every 16th step a write."""
    model, indexers = small
    rules = {**EXACT, "top_k": 192, "n_recent": 40}
    counts = {}
    for sparse in (False, True):
        patch = patch_sparse_generate(model, indexers, **rules) if sparse else None
        cache = make_prompt_cache(model)
        feed_calls(model, make_tokens(222), [200] + [1] * 22, cache)
        steps = []
        for _ in range(16):
            out = model(make_tokens(1), cache=cache)
            steps.append(count_operations(out, tmp_path))
            mx.eval(out)
        counts[sparse] = steps
        if patch:
            patch.restore()
    n = len(model.layers)
    assert all(step["SliceUpdate"] == 2 * n for step in counts[False])
    more = [a - b for a, b in zip(counts[True], counts[False])]
    less = [b - a for a, b in zip(counts[True], counts[False])]
    # A dense cache has rows to spare, and slices them off.
    assert all(step["Matmul"] == 2 * n for step in less)
    plain = Counter({"Split": n})
    writes = Counter({"SliceUpdate": n, "Concatenate": n, "Depends": n})
    assert sorted(map(len, more)) == [1] * 15 + [4]
    assert more.count(plain) == 15 and more.count(plain + writes) == 1


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("evict", ["retention", "index", "window"])
def test_a_step_copies_no_cache(evict, positions):
    """Neither to write a row nor because attention would want another layout."""
    model = make_model(layers=1, heads=4, kv_heads=4, head_dim=64)
    rules = dict(top_k=1000, n_recent=64, evict=evict, positions=positions)
    with patch_sparse_generate(model, with_heads(model), **rules):
        (cache,) = make_prompt_cache(model)
        feed_calls(model, make_tokens(1110), [1100] + [1] * 10, [cache])
        for seed in range(4):
            token = make_tokens(1, seed)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(model(token, cache=[cache]))
            assert mx.get_peak_memory() - before < cache.keys.nbytes / 2


def test_other_scores_keep_other_positions(small):
    model, indexers = small
    tokens = make_tokens(61)
    kept = []
    for sign in (1, -1):
        changed = with_heads(model)
        changed[0].retention.down.weight = sign * indexers[0].retention.down.weight
        with patch_sparse_generate(model, changed, **EXACT):
            cache = make_prompt_cache(model)
            feed_calls(model, tokens, [60, 1], cache)
            kept.append(set(cache[0].positions[0].tolist()))
    assert kept[0] != kept[1]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_budget_of_the_whole_length_is_dense(small, chunk):
    model, indexers = small
    tokens = make_tokens(100)
    calls = [chunk] * (100 // chunk) + [100 % chunk] * (100 % chunk > 0)
    dense = feed_calls(model, tokens, calls, make_prompt_cache(model))
    with patch_sparse_generate(model, indexers, top_k=100):
        sparse = feed_calls(model, tokens, calls, make_prompt_cache(model))
    assert mx.array_equal(mx.concatenate(dense, 1), mx.concatenate(sparse, 1))


def test_prune_before_a_question(small):
    model, indexers = small
    tokens = make_tokens(80)
    with patch_sparse_generate(model, indexers, **EXACT) as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, tokens[:, :60], [60], cache)
        patch.prune(cache)
        assert all(c.size() == 24 and c.offset == 60 for c in cache)
        patch.prune(cache)
        assert all(c.size() == 24 for c in cache)
        feed_calls(model, tokens[:, 60:], [19, 1], cache)
        assert all(c.size() == 24 and c.offset == 80 for c in cache)


def test_pooling_reaches_four_positions_and_no_further():
    positions = np.array([[0, 1, 2, 6, 7, 12, 13, 30]], np.int32)
    scores = np.random.default_rng(0).normal(size=positions.shape).astype(np.float32)
    pooled = pool_neighbours(mx.array(scores), mx.array(positions), 4)
    expected = pool_in_numpy(scores[0], positions[0])
    np.testing.assert_array_equal(np.array(pooled)[0], expected.astype(np.float32))
    assert not np.array_equal(np.array(pooled)[0], scores[0])


def test_indexers_without_heads_evict_by_keydiff_and_say_so():
    model = make_model(**SHAPES["gqa2"])
    indexers = make_indexers(model)
    tokens = make_tokens(90)
    kept = {}
    for evict in ("retention", "keydiff", "index"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with patch_sparse_generate(model, indexers, **EXACT, evict=evict):
                cache = make_prompt_cache(model)
                feed_calls(model, tokens, [60] + [1] * 30, cache)
                kept[evict] = [sorted(c.positions[0].tolist()) for c in cache]
        messages = [str(w.message) for w in said if "retention" in str(w.message)]
        assert len(messages) == (evict == "retention")
    assert kept["retention"] == kept["keydiff"] != kept["index"]


def test_heads_are_saved_with_the_indexers(small, tmp_path):
    _, indexers = small
    save_indexers(tmp_path, indexers)
    loaded = load_indexers(tmp_path)
    x = mx.random.normal((1, 9, 64))
    for i, indexer in indexers.items():
        assert loaded[i].has_retention
        assert mx.array_equal(loaded[i].retention(x), indexer.retention(x))
        assert mx.array_equal(loaded[i].project_keys(x), indexer.project_keys(x))


def test_default_is_retention():
    assert SparseConfig().evict == "retention"


@pytest.mark.parametrize("n_recent", [2, 3, 5])
def test_index_keys_follow_keydiffs_evictions(n_recent):
    """With few recent ones no eviction is planned, and slots are sorted between steps."""
    model = make_model(layers=1)
    indexers, tokens = make_indexers(model), make_tokens(37)
    with patch_sparse_generate(model, indexers, top_k=100, cache="full"):
        (full,) = make_prompt_cache(model)
        feed_calls(model, tokens, [37], [full])
    rules = dict(top_k=24, n_sink=2, n_recent=n_recent, prefill="exact", evict="keydiff")
    with patch_sparse_generate(model, indexers, **rules) as patch:
        (cache,) = make_prompt_cache(model)
        feed_calls(model, tokens, [30] + [1] * 7, [cache])
        patch.prune([cache])  # drops nothing, and makes what steps left open
    assert cache.size() == 24
    theirs = full.index_keys[:, :, cache.positions[0]]
    assert mx.abs(cache.index_keys - theirs).max() < 1e-5
