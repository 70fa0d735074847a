"""One test for each mistake that others made (docs/design.md, Traps)."""

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from builders import EXACT, feed, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from probe import CONTENT, Probe, clear_probe
from simulate import generate_calls, run_program

from mlx_dsa import BudgetKVCache, patch_sparse_generate

SMALL = dict(EXACT, evict="index")


def test_the_last_prompt_token_still_sees_the_whole_prompt():
    """Pruning before it is scored would leave it what other queries chose."""
    calls = generate_calls(90, 32, steps=1)
    probe, expected = clear_probe(calls, SMALL)
    sets = probe.program(calls, **SMALL)
    with patch_sparse_generate(probe.model, probe.indexers, **SMALL) as patch:
        cache = patch.make_cache()[0]
        attention = probe.model.layers[0].self_attn
        for start, length in zip(np.cumsum([0] + calls), calls[:-1]):
            attention(mx.array(probe.x[:, start : start + length]), None, cache)
        assert cache.size() == 90  # it may not have been the last one
        patch.end_prompts([cache])
        kept = set(cache.positions[0].tolist())
    assert sets[89] == expected[89]
    assert len(sets[89]) == len(kept) == 24
    assert sets[89] - kept  # it used what is pruned right after it


def test_a_step_attends_before_it_evicts_and_a_chunk_evicts_nothing():
    model = make_model()
    with patch_sparse_generate(model, make_indexers(model), **SMALL):
        cache, _ = feed(model, make_tokens(40), 39)
        assert [c.size() for c in cache] == [24, 24]
        for n in (7, 11):
            feed(model, make_tokens(n), n, cache)
        assert [c.size() for c in cache] == [42, 42]
        feed(model, make_tokens(1), 1, cache)
        assert [c.size() for c in cache] == [24, 24]


def test_earlier_chunks_stay_within_reach():
    """Index keys of every chunk are kept: a key 9 chunks back is found."""
    length, needle = 160, 11
    probe = Probe(length, n_heads=1, head_dim=8, rope_dim=2)
    indexer = probe.indexers[0]
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((length, CONTENT)) * 0.1
    noise[:, 0] = 1.0  # the head weight, and a mark on the needle alone
    noise[:, 1] = -1.0
    noise[needle, 1] = 1.0
    probe.x[0, :, :CONTENT] = noise
    wq, wk, head = (
        np.zeros(w.shape, np.float32) for w in (indexer.wq.weight, indexer.wk.weight, indexer.weights_proj.weight)
    )
    wq[7, 0] = wk[7, 1] = head[0, 0] = 1.0
    indexer.wq.weight, indexer.wk.weight = mx.array(wq), mx.array(wk)
    indexer.weights_proj.weight = mx.array(head)
    indexer.wq.bias, indexer.wk.bias = mx.zeros(8), mx.zeros(8)
    for calls in ([16] * 10, [1] * 160):
        sets = probe.program(calls, **SMALL, cache="full")
        assert all(needle in sets[p] for p in range(needle, length))
        assert needle - 1 not in sets[length - 1]


@pytest.mark.parametrize("sparse", [[1], [0]])
def test_layers_of_different_length_do_not_share_a_mask(sparse):
    """mlx-lm builds one mask from cache[0], dense or pruned, for all layers."""
    model = make_model()
    indexers = make_indexers(model, layers=sparse)
    tokens = make_tokens(80)
    with patch_sparse_generate(model, indexers, **SMALL):
        cache, _ = feed(model, tokens[:, :50], 49)
        lengths = {c.size() for c in cache}
        assert lengths == {24, 50}
        _, chunk = feed(model, tokens[:, 50:], 30, cache)
        # The same layer, given nothing but its own cache and no mask at all.
        again, _ = feed(model, tokens[:, :50], 49)
        h = model.model.embed_tokens(tokens[:, 50:])
        for layer, c in zip(model.layers, again):
            own = None if isinstance(c, BudgetKVCache) else "causal"
            h = layer(h, own, c)
        expected = model.model.embed_tokens.as_linear(model.model.norm(h))
    assert mx.array_equal(chunk, expected)


# RoPE: an indexer made of the attention's own weights must find the keys that
# the attention itself looks at, far beyond top_k.


def perfect_probe(length):
    """One head, and an indexer whose scores are the attention logits."""
    probe = Probe(
        length,
        heads=1,
        kv_heads=1,
        n_heads=1,
        head_dim=length,
        rope_dim=length,
        norm=True,
    )
    attention, indexer = probe.model.layers[0].self_attn, probe.indexers[0]
    indexer.wq.weight = attention.q_proj.weight
    indexer.wk.weight = attention.k_proj.weight
    indexer.q_norm.weight = attention.q_norm.weight
    indexer.k_norm.weight = attention.k_norm.weight
    head = np.zeros((1, CONTENT + length), np.float32)
    head[0, 0] = 1.0
    indexer.weights_proj.weight = mx.array(head)
    probe.x[:, :, 0] = 1.0  # a positive head weight for every query
    return probe


def recall(probe, spoil=lambda indexer: None):
    """Return the share of the true attention's top keys that are selected."""
    length = probe.x.shape[1]
    x = mx.array(probe.x)
    dense = np.array(probe.model.layers[0].self_attn(x, "causal"))[0, :, CONTENT:]
    with patch_sparse_generate(probe.model, probe.indexers, top_k=12, n_sink=0, n_recent=1, prefill="exact") as patch:
        spoil(patch.layers[0].indexer)
        cache = patch.make_cache()[0]
        out = [patch.layers[0](x[:, i : i + 40], None, cache) for i in range(0, length, 40)]
        chosen = np.array(mx.concatenate(out, axis=1))[0, :, CONTENT:] > 0
    hits = []
    for t in range(100, length):
        # All but one: the query's own key is forced in, whatever its weight.
        best = np.argsort(-dense[t])[:11]
        hits.append(chosen[t, best].mean())
    return np.mean(hits)


def test_rope_of_the_indexer_is_the_one_of_the_attention():
    probe = perfect_probe(200)
    assert recall(probe) == 1.0

    def pairs(indexer):
        indexer.rope = nn.RoPE(200, traditional=True, base=10_000.0)

    def base(indexer):
        indexer.rope = nn.RoPE(200, traditional=False, base=1e6)

    def none(indexer):
        indexer.rope = lambda x, offset: x

    for spoil in (pairs, base, none):
        assert recall(perfect_probe(200), spoil) < 0.9, spoil.__name__


def test_wrong_rope_is_invisible_while_all_keys_fit():
    """Why the test above is needed."""
    model = make_model()
    tokens = make_tokens(60)
    _, dense = feed(model, tokens, 60)
    with patch_sparse_generate(model, make_indexers(model), top_k=68) as patch:
        for layer in patch.layers.values():
            layer.indexer.rope = nn.RoPE(8, traditional=True)
        assert mx.array_equal(feed(model, tokens, 60)[1], dense)


def test_ties_are_decided_the_same_way_in_every_run():
    """A ReLU that is mostly zero: what is kept must not depend on chance."""
    model = make_model()
    indexers = make_indexers(model, n_heads=1, head_dim=2, rope_dim=2)
    calls = generate_calls(90, 64, steps=20)
    tokens = make_tokens(sum(calls))
    rules = dict(SMALL, prefill="dense")
    with patch_sparse_generate(model, indexers, **rules) as patch:
        layer = patch.layers[0]
        x = model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
        scores = layer.indexer.scores(x, layer.indexer.project_keys(x, 0), 0)
        assert (scores == 0).mean() > 0.25
    runs = [run_program(model, indexers, rules, tokens, calls) for _ in range(3)]
    assert runs[0][1] == runs[1][1] == runs[2][1]
    for a, b in zip(runs[0][0], runs[2][0]):
        assert np.array_equal(a, b)


def test_the_future_never_outranks_a_negative_score():
    """All visible scores far below zero, rows that see fewer than top_k keys."""
    probe = Probe(64, n_heads=2, head_dim=8, rope_dim=2)
    indexer = probe.indexers[0]
    for name in ("wq", "wk"):
        weight = mx.zeros(getattr(indexer, name).weight.shape)
        getattr(indexer, name).weight = weight
        getattr(indexer, name).bias = mx.full((weight.shape[0],), 1e3)
    indexer.weights_proj.weight = -mx.abs(indexer.weights_proj.weight)
    probe.x[:, :, :CONTENT] = np.abs(probe.x[:, :, :CONTENT])
    for prefill in ("exact", "tile"):
        rules = dict(SMALL, prefill=prefill, tile_size=8, cache="full")
        sets = probe.program([64], **rules)
        for p, chosen in sets.items():
            assert max(chosen) == p
            least = 24 if prefill == "exact" else 17
            assert least <= len(chosen) <= 24 or len(chosen) == p + 1


def test_calling_the_model_is_sparse():
    """A `__call__` set on the instance would do nothing."""
    model = make_model()
    tokens = make_tokens(60)
    dense = model(tokens)
    with patch_sparse_generate(model, make_indexers(model), **SMALL):
        assert mx.abs(model(tokens) - dense).max() > 1e-2
    assert mx.array_equal(model(tokens), dense)


def test_import_builds_no_kernel():
    """Where there is no CUDA or Metal, constructing one would raise."""
    code = (
        "import mlx.core as mx\n"
        "def refuse(*a, **k): raise RuntimeError('a kernel was built at import')\n"
        "mx.fast.metal_kernel = mx.fast.cuda_kernel = refuse\n"
        "import mlx_dsa, mlx_dsa.attention, mlx_dsa.ops\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameter_names_change_while_patched_only():
    model = make_model()
    names = [n for n, _ in tree_flatten(model.parameters())]
    with patch_sparse_generate(model, make_indexers(model), **SMALL):
        assert [n for n, _ in tree_flatten(model.parameters())] != names
    assert [n for n, _ in tree_flatten(model.parameters())] == names


def loss(model, tokens, calls):
    """Return the mean NLL of all tokens but the first 60, in nats."""
    cache, parts, start = make_prompt_cache(model), [], 0
    for length in calls:
        parts.append(model(tokens[:, start : start + length], cache=cache))
        start += length
    logits = mx.concatenate(parts, axis=1)[:, 60:-1]
    return nn.losses.cross_entropy(logits, tokens[:, 61:], reduction="mean").item()


def test_perplexity_says_nothing_until_something_is_left_out():
    model = make_model()
    indexers = make_indexers(model)
    tokens = make_tokens(120)
    dense = loss(model, tokens, [120])
    with patch_sparse_generate(model, indexers, **{**SMALL, "top_k": 120}):
        assert loss(model, tokens, [120]) == dense
    with patch_sparse_generate(model, indexers, **SMALL) as patch:
        prefill = loss(model, tokens, [120])
        assert not any(c.size() < c.offset for c in patch._caches)
        steps = loss(model, tokens, [60] + [1] * 60)
    assert abs(prefill - dense) > 1e-4
    # One prefill evicts nothing: it measures another thing than decoding does.
    assert abs(steps - prefill) > 1e-4


def test_the_window_baseline_needs_no_indexer():
    """Sinks and the newest keys are what an indexer must beat."""
    model = make_model()
    calls = generate_calls(60, 32, 20)
    tokens = make_tokens(sum(calls))
    blind = make_indexers(model)
    for indexer in blind.values():
        indexer.weights_proj.weight *= 0
    window = dict(SMALL, evict="window", prefill="dense")
    index = dict(SMALL, evict="index", prefill="dense")
    by_window = run_program(model, make_indexers(model), window, tokens, calls)[1]
    by_nothing = run_program(model, blind, index, tokens, calls)[1]
    by_index = run_program(model, make_indexers(model), index, tokens, calls)[1]
    assert by_window == by_nothing
    assert by_window[-1] == [{0, 1, 2} | set(range(59, 80))] * 2
    assert by_index[-1] != by_window[-1]


def test_dense_layers_keep_mlx_lms_own_cache():
    model = make_model()
    with patch_sparse_generate(model, make_indexers(model, layers=[1]), **SMALL):
        assert [type(c) for c in make_prompt_cache(model)] == [KVCache, BudgetKVCache]


def test_speculative_decoding_is_refused():
    """Its calls of several tokens would never be evicted from."""
    model, draft = make_model(), make_model(seed=3)
    tokens = make_tokens(60)[0]
    with patch_sparse_generate(model, make_indexers(model), **SMALL):
        with pytest.raises(ValueError, match="Leave draft_model out"):
            list(speculative_generate_step(tokens, model, draft, max_tokens=3))


def test_a_cache_of_another_budget_is_refused():
    model = make_model()
    indexers = make_indexers(model)
    with patch_sparse_generate(model, indexers, **SMALL) as patch:
        cache = patch.make_cache()
    with patch_sparse_generate(model, indexers, **{**SMALL, "top_k": 30}):
        with pytest.raises(ValueError, match="keeps 24 entries but top_k is 30"):
            model(make_tokens(4), cache=cache)
