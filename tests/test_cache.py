"""What the caches hold after every call, and mlx-lm's contract for them."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from builders import feed, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_cache
from simulate import (
    LOGITS,
    MARGIN,
    RULES,
    difference,
    generate_calls,
    kept_positions,
    make_small,
)

from mlx_dsa import BudgetKVCache, FullKVCache, patch_sparse_generate
from numpy_reference import Rules


@pytest.fixture(scope="module")
def small():
    return make_small()


def test_entries_move_with_their_positions(small):
    """After evictions each slot still has the entry of the position it names."""
    model, indexers, _ = small
    tokens = make_tokens(100)
    with patch_sparse_generate(model, indexers, **{**RULES, "top_k": 100}):
        full, _ = feed(model, tokens[:, :60], 60)
    with patch_sparse_generate(model, indexers, **{**RULES, "prefill": "dense"}):
        cache, _ = feed(model, tokens[:, :59], 32)
        feed(model, tokens[:, 59:60], 1, cache)
    for c, f in zip(cache, full):
        positions = c.positions[0]
        assert c.size() == 24 and c.keys.shape[2] == 24
        # Prefill is dense, so up to the step that prunes all entries are alike.
        for name in ("keys", "values", "index_keys"):
            ours = getattr(c, name)
            theirs = getattr(f, name)[:, :, positions]
            older = positions < 59
            assert mx.abs(mx.where(older[:, None], ours - theirs, 0)).max() < 1e-5


def test_index_keys_follow_evictions():
    """Slots named by positions hold that position's index key, steps later too."""
    model = make_model(layers=1)
    indexers = make_indexers(model)
    tokens = make_tokens(100)
    with patch_sparse_generate(model, indexers, top_k=100, cache="full"):
        (full,), _ = feed(model, tokens, 100)
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        (cache,), _ = feed(model, tokens[:, :59], 32)
        feed(model, tokens[:, 59:], 1, [cache])
        patch.prune([cache])  # drops nothing, and makes what steps left open
    # One layer: entries depend on the token alone, not on what was attended to.
    assert cache.offset == 100 and cache.size() == 24
    assert sorted(cache.positions[0].tolist()) != list(range(76, 100))
    for name in ("keys", "values", "index_keys"):
        theirs = getattr(full, name)[:, :, cache.positions[0]]
        assert mx.abs(getattr(cache, name) - theirs).max() < 1e-5


def test_offset_and_shapes(small):
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **RULES):
        cache = lm_cache.make_prompt_cache(model)
        assert all(type(c) is BudgetKVCache and c.budget == 24 for c in cache)
        assert all(c.empty() and c.offset == c.size() == c.nbytes == 0 for c in cache)
        feed(model, make_tokens(50, batch=2), 50, cache)
        assert all(c.offset == c.size() == 50 and not c.empty() for c in cache)
        feed(model, make_tokens(10, batch=2), 1, cache)
    for c in cache:
        assert c.offset == 60 and c.size() == 24
        assert c.keys.shape == c.values.shape == (2, 2, 24, 32)
        assert c.index_keys.shape == (2, 1, 24, 12)
        assert c.positions.shape == (2, 24) and c.positions.dtype == mx.int32


def test_memory_of_a_budget_cache_is_bounded(small):
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **RULES):
        cache, _ = feed(model, make_tokens(300), 299)
        after_prompt = [c.nbytes for c in cache]
        for _ in range(3):
            feed(model, make_tokens(17), 1, cache)
            mx.eval([c.contents for c in cache])  # what waits lies in one block
            # At most n_recent hidden states wait for their index keys.
            assert all(c.n_late <= c.most_late <= 24 // 4 for c in cache)
            waiting = cache[0].most_late * 64 * 4
            assert [c.nbytes for c in cache] == [n + waiting for n in after_prompt]
    entries = 24 * 4 * (2 * 2 * 32 + 12)
    assert all(entries <= n <= entries + 24 * 4 for n in after_prompt)


def test_caches_of_two_phases_do_not_grow_at_once():
    """What grows is in memory twice."""
    caches, grown = [BudgetKVCache(8, phase) for phase in (0, 1, 2)], []
    room = [0, 0, 0]
    for n in range(256, 16384 + 1, 256):
        for cache in caches:
            cache.append(*(mx.zeros((1, 1, 256, 2)) for _ in range(3)))
        now = [cache._buffers[0].shape[2] for cache in caches]
        assert all(n <= size <= max(n + 256, 3 * n / 2) for size in now)
        grown.append([a != b for a, b in zip(now, room)])
        room = now
    assert [even for even, _, even_too in grown] == [even_too for _, _, even_too in grown]
    late = grown[16:]  # from 4,096 on: before, all grow with every 256 tokens
    assert any(even for even, _, _ in late) and any(odd for _, odd, _ in late)
    assert not any(even and odd for even, odd, _ in late)


def test_positions_stay_what_they_were(small):
    """Those of later steps are written in place, but not into what was handed out."""
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **{**RULES, "evict": "window"}):
        cache, _ = feed(model, make_tokens(60), 59)
        feed(model, make_tokens(3), 1, cache)
        cache[0].settle(model.layers[0].self_attn.eviction.project)
        assert cache[0].n_planned  # by a plan
        handed_out = cache[0].positions
        before = np.array(handed_out)
        feed(model, make_tokens(3), 1, cache)
        cache[0].settle(model.layers[0].self_attn.eviction.project)
        assert np.array_equal(np.array(handed_out), before)
        assert not np.array_equal(np.array(cache[0].positions), before)


def test_full_cache_keeps_everything(small):
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **RULES, cache="full"):
        cache, _ = feed(model, make_tokens(80), 70)
        assert all(type(c) is FullKVCache for c in cache)
        feed(model, make_tokens(5), 1, cache)
    for c in cache:
        assert c.offset == c.size() == 85 and c.is_trimmable()
        assert c.positions.tolist() == [list(range(85))]


@pytest.mark.parametrize("rest", [1, 3, 34])
@pytest.mark.parametrize("taken", [0, 5, 9])
@pytest.mark.parametrize("kind", ["budget", "full"])
def test_trim_takes_back_tokens(small, kind, taken, rest):
    """Of the last 8 queries, those that were taken back decide nothing."""
    model, indexers, reference = small
    rules = {**RULES, "cache": kind}
    calls = generate_calls(rest, 16, 10)
    for seed in range(300):
        tokens = make_tokens(45, seed)
        run = reference.start(Rules(**rules))
        run.feed(tokens[0].tolist())
        run.trim(taken)
        parts = [make_tokens(n, seed=300 + n) for n in calls]
        expected = [run.feed(part[0].tolist()) for part in parts]
        if min(run.rules.margins) > MARGIN:
            break
    with patch_sparse_generate(model, indexers, **rules):
        cache, _ = feed(model, tokens, 45)
        assert lm_cache.can_trim_prompt_cache(cache)
        assert lm_cache.trim_prompt_cache(cache, taken) == taken
        assert all(c.offset == c.size() == 45 - taken for c in cache)
        ours = [np.array(feed(model, part, 64, cache)[1][0]) for part in parts]
        assert difference(ours, expected) < LOGITS
        assert [kept_positions(c) for c in cache] == [run.kept(0), run.kept(1)]


def test_trim_takes_back_everything(small):
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **RULES):
        fresh, expected = feed(model, make_tokens(60), 50)
        cache, _ = feed(model, make_tokens(9, seed=5), 9)
        assert lm_cache.trim_prompt_cache(cache, 100) == 9
        _, logits = feed(model, make_tokens(60), 50, cache)
    assert mx.array_equal(logits, expected)


def test_a_cache_that_has_evicted_is_untrimmable(small):
    model, indexers, _ = small
    with patch_sparse_generate(model, indexers, **RULES):
        cache, _ = feed(model, make_tokens(24), 23)
        assert lm_cache.can_trim_prompt_cache(cache)
        feed(model, make_tokens(1), 1, cache)
    assert not lm_cache.can_trim_prompt_cache(cache)
    assert lm_cache.trim_prompt_cache(cache, 2) == 0
    assert all(c.trim(2) == 0 and c.offset == 25 for c in cache)


@pytest.mark.parametrize("calls", [[30], [59, 1], [59] + [1] * 9, [24, 1, 7]])
@pytest.mark.parametrize("kind", ["budget", "full"])
def test_state_makes_a_cache_that_goes_on_the_same(small, kind, calls):
    model, indexers, _ = small
    more = make_tokens(20, seed=8)
    with patch_sparse_generate(model, indexers, **{**RULES, "cache": kind}):
        tokens, cache, start = make_tokens(sum(calls)), None, 0
        for length in calls:
            cache, _ = feed(model, tokens[:, start : start + length], length, cache)
            start += length
        copies = [
            copy.deepcopy(cache),
            [type(c).from_state(c.state) for c in cache],
        ]
        calls = [12, 1, 1, 1, 5]
        results = []
        for caches in (cache, *copies):
            out = []
            for i, length in enumerate(calls):
                part = more[:, sum(calls[:i]) : sum(calls[: i + 1])]
                out.append(feed(model, part, length, caches)[1])
            results.append(mx.concatenate(out, axis=1))
    for c, other in zip(cache * 2, copies[0] + copies[1]):
        assert other.offset == c.offset and other.size() == c.size()
        assert mx.array_equal(other.positions, c.positions)
    assert all(mx.array_equal(r, results[0]) for r in results[1:])


def test_empty_state_round_trips():
    for cache in (BudgetKVCache(8), FullKVCache()):
        other = type(cache).from_state(cache.state)
        assert other.empty() and other.offset == other.size() == 0
        mx.eval([cache.state])
    assert BudgetKVCache.from_state(BudgetKVCache(8).state).budget == 8


def test_mask_and_inheritance():
    for cache in (BudgetKVCache(8), FullKVCache()):
        assert cache.make_mask(1) is None
        assert cache.make_mask(7) == "causal"
        # mlx-lm would take the class for its own, and swap it.
        assert not isinstance(cache, (lm_cache.KVCache, lm_cache.RotatingKVCache))
        assert not hasattr(type(cache), "merge")


@pytest.mark.parametrize("budget", [0, -1])
def test_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="budget"):
        BudgetKVCache(budget)


def test_clear_empties_every_cache_of_the_patch(small):
    model, indexers, _ = small
    tokens = make_tokens(60)
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        first, expected = feed(model, tokens, 50)
        second, _ = feed(model, tokens, 1)
        patch()
        for c in first + second:
            assert c.empty() and c.offset == c.size() == 0
            assert [a for _, a in tree_flatten(c.state) if isinstance(a, mx.array)] == []
        _, again = feed(model, tokens, 50, first)
    assert mx.array_equal(again, expected)
