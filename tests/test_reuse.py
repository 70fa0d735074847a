"""Layers that read what a layer before them has selected: the same sets, and nothing spent on them."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from builders import SMALL_RULES, feed, layer_of, make_indexers, make_model, make_tokens
from mlx_lm.models.cache import make_prompt_cache
from simulate import MARGIN, whole_calls

from mlx_dsa import SparseConfig, load_cache, patch_sparse_generate, save_cache
from mlx_dsa.rules import lightning
from mlx_dsa.rules.reuse import choose_layers
from numpy_reference import prompt_rules as expected
from numpy_reference.rules import attention

TILES = dict(SMALL_RULES, top_k=40, tile_size=16)


def arrays(model, index, x):
    found = layer_of(model, index).project(mx.array(x[None].astype(np.float32)), 0)[:3]
    return [np.array(a[0]).astype(np.float64) for a in found]


def query_sets(q, k):
    sets, margin = [], 1.0
    for t in range(q.shape[1]):
        chosen, m = set(range(t + 1)), 1.0
        if t >= SMALL_RULES["top_k"]:
            chosen, m = expected.hip(q[:, t], k[:, : t + 1], SMALL_RULES, 1)
        sets.append(chosen)
        margin = min(margin, m)
    return sets, margin


def tile_sets(q, k):
    sets, margin = [], 1.0
    for start in range(0, q.shape[1], 16):
        stop = min(start + 16, q.shape[1])
        shared, m = set(range(start)), 1.0
        if stop > TILES["top_k"]:
            shared, m = expected.hip_tile(q[:, start:stop], k[:, :stop], TILES, 1)
        sets += [shared | set(range(start, t + 1)) for t in range(start, stop)]
        margin = min(margin, m)
    return sets, margin


def answers(model, xs, calls, select, **rules):
    """Return what each layer answers to its own hidden states `[L, dim]`."""
    rules = {**SMALL_RULES, "cache": "full", "prefill": "exact", "evict": "window", "select": select, **rules}
    with patch_sparse_generate(model, None, **rules) as patch:
        caches, parts, start = patch.make_cache(), [], 0
        for n in calls:
            inputs = [mx.array(x[None, start : start + n].astype(np.float32)) for x in xs]
            parts.append([np.array(patch.layers[i](x, None, caches[i])[0]) for i, x in enumerate(inputs)])
            patch.end_prompts(caches)
            start += n
    return [np.concatenate(layer) for layer in zip(*parts)]


@pytest.mark.parametrize(
    "prefill, find, length, cuts",
    [
        ("exact", query_sets, 70, ([70], whole_calls(70, 33), [31, 1, 30] + [1] * 8, [1] * 70)),
        ("tile", tile_sets, 90, ([90], [48, 42], [16] * 5 + [10])),
    ],
)
def test_layers_attend_to_the_sets_of_the_layer_before(prefill, find, length, cuts):
    model = make_model(layers=3)
    rules = dict(TILES, prefill=prefill) if prefill == "tile" else {}
    for seed in range(200):
        draw = np.random.default_rng(seed)
        xs = [draw.standard_normal((length, 64)) for _ in range(3)]
        qkvs = [arrays(model, i, x) for i, x in enumerate(xs)]
        found = [find(*qkv[:2]) for qkv in qkvs]
        if min(m for _, m in found) > MARGIN:
            break
    of = {"reuse:of=hip": (0, 0, 2), "reuse:of=hip,layers=1": (0, 1, 1), "reuse:of=hip,every=3": (0, 0, 0)}
    theirs = {}
    for text, layers in {**of, "hip": (0, 1, 2)}.items():
        theirs[text] = []
        for i, at in enumerate(layers):
            out = attention(*qkvs[i], [found[at][0]] * 2, layer_of(model, i).scale)
            out = mx.array(out[None].astype(np.float32))
            theirs[text].append(np.array(layer_of(model, i).output(out, None)[0]))
    for text in of:
        for calls in cuts:
            ours = answers(model, xs, calls, text, **rules)
            assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(ours, theirs[text]))
        # Layers that select for themselves are others.
        assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(ours, theirs["hip"]))


def test_layers_that_reuse_score_nothing_and_keep_no_index_keys(monkeypatch):
    """Over lightning: a third of the scoring calls, of the indexers' projections and of the index keys."""
    model, tokens = make_model(layers=6), make_tokens(60)
    indexers, scored, projected = make_indexers(model), [], []
    index_scores = lightning.index_scores
    monkeypatch.setattr(lightning, "index_scores", lambda *a: scored.append(1) or index_scores(*a))
    cls = type(indexers[0])
    for name in ("project_queries", "project_keys", "project"):
        real = getattr(cls, name)

        def spy(self, *arguments, of=real, name=name):
            projected.append(name)
            return of(self, *arguments)

        monkeypatch.setattr(cls, name, spy)
    counts = {}
    for select in ("lightning", "reuse:every=3"):
        with patch_sparse_generate(model, indexers, **SMALL_RULES, cache="full", select=select, evict="window"):
            caches = make_prompt_cache(model)
            model(tokens[:, :50], cache=caches)
            mx.eval([c.contents for c in caches])
            scored.clear()
            projected.clear()
            for i in range(50, 60):
                mx.eval(model(tokens[:, i : i + 1], cache=caches))
            index_bytes = [0 if c.index_keys is None else c.index_keys.nbytes for c in caches]
            key_bytes = sum(c.keys.nbytes + c.values.nbytes for c in caches)
            counts[select] = len(scored), len(projected), sum(index_bytes), key_bytes
            assert [b > 0 for b in index_bytes] == [select == "lightning" or i % 3 == 0 for i in range(6)]
    # A step projects keys and queries together, in one call that may take others.
    (all_scored, all_projected, all_bytes, keys), few = counts.values()
    assert all_scored == 60 and few[0] == 20
    assert few[1] * 3 == all_projected and few[2] * 3 == all_bytes and few[3] == keys


def test_reuse_of_one_layer_is_the_rule_itself():
    model, tokens = make_model(layers=3), make_tokens(70)
    rules = dict(SMALL_RULES, cache="full", prefill="exact", evict="window")
    logits = []
    for select in ("lightning", "reuse:every=1", "reuse:layers=0+1+2", "reuse:layers=1", "reuse"):
        with patch_sparse_generate(model, make_indexers(model), **rules, select=select) as patch:
            logits.append(feed(model, tokens, 33)[1])
            reuses = [patch.layers[i].selecting.reuses for i in range(3)] if select != "lightning" else None
    assert mx.array_equal(logits[0], logits[1]) and mx.array_equal(logits[0], logits[2])
    assert mx.abs(logits[3] - logits[0]).max() > 1e-3 and mx.abs(logits[4] - logits[3]).max() > 1e-3
    assert reuses == [False, True, False]


def test_dense_layers_are_not_counted():
    model = make_model(layers=4)
    rules = dict(SMALL_RULES, cache="full", select="reuse:of=window", evict="window", dense_layers=(0, 2))
    with patch_sparse_generate(model, None, **rules) as patch:
        assert {i: sparse.selecting.reuses for i, sparse in patch.layers.items()} == {1: False, 3: True}


@pytest.mark.parametrize("select", ["reuse", "reuse:of=quest:page=4", "reuse:of=quest:by_head=true", "reuse:of=top_p"])
def test_steps_of_decode_in_one_call_are_the_same(select):
    model, tokens = make_model(layers=4), make_tokens(70)
    with patch_sparse_generate(model, make_indexers(model), **SMALL_RULES, cache="full", select=select) as patch:
        answers = []
        for step in (1, 20):
            caches = make_prompt_cache(model)
            model(tokens[:, :50], cache=caches)
            with patch.decoding(caches):
                parts = [model(tokens[:, i : i + step], cache=caches) for i in range(50, 70, step)]
            answers.append(mx.concatenate(parts, axis=1))
    assert mx.abs(answers[0] - answers[1]).max() < 1e-4


def test_a_saved_cache_goes_on(tmp_path):
    model, tokens = make_model(layers=4), make_tokens(70)
    rules = dict(SMALL_RULES, cache="full", select="reuse", evict="window")
    with patch_sparse_generate(model, make_indexers(model), **rules) as patch:
        caches = make_prompt_cache(model)
        model(tokens[:, :60], cache=caches)
        loaded = load_cache(save_cache(tmp_path / "it.kv", caches, patch), patch).caches
        assert [c.index_keys is None for c in loaded] == [False, True] * 2
        for i in range(60, 70):
            here, there = (model(tokens[:, i : i + 1], cache=c) for c in (caches, loaded))
            assert mx.array_equal(here, there)


def test_layers_of_other_calls_are_told():
    model, tokens = make_model(layers=2), make_tokens(60)
    rules = dict(SMALL_RULES, cache="full", select="reuse:of=oracle", prefill="exact", evict="window")
    with patch_sparse_generate(model, None, **rules):
        long, short = make_prompt_cache(model), make_prompt_cache(model)
        model(tokens[:, :50], cache=long)
        model(tokens[:, :40], cache=short)
        with pytest.raises(ValueError, match="layer 1 must read what a layer before it has selected"):
            model(tokens[:, 50:51], cache=[long[0], short[1]])


def test_the_layers_chosen_share_most():
    draw = np.random.default_rng(0)
    greedy_is_best = 0
    for case in range(20):
        n_layers, n = 7, 1 + case % 5
        shares = draw.random((n_layers, n_layers))
        np.fill_diagonal(shares, 1)

        def total(layers, shares=shares):
            return sum(shares[max(i for i in layers if i <= j)][j] for j in range(len(shares)))

        every = [(0, *others) for others in itertools.combinations(range(1, n_layers), n - 1)]
        chosen = choose_layers(shares.tolist(), n)
        assert len(chosen) == n and chosen[0] == 0
        assert total(chosen) == pytest.approx(max(map(total, every)))
        greedy = [0]
        while len(greedy) < n:
            greedy.append(max(set(range(n_layers)) - set(greedy), key=lambda i: total([*greedy, i])))
        greedy_is_best += total(greedy) == pytest.approx(total(chosen))
    assert greedy_is_best < 20
    with pytest.raises(ValueError, match="'n' must be from 1 to 7"):
        choose_layers(shares.tolist(), 8)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select="reuse"), "only in cache 'full', but 'cache' is 'budget'"),
        (dict(select="reuse", cache="tiered"), "only in cache 'full'|reads the keys"),
        (dict(select="reuse:of=reuse", cache="full"), "option 'of' must be another rule"),
        (dict(select="reuse:of=nope", cache="full"), "must be one of"),
        (dict(select="reuse:layers=0-3", cache="full"), "option 'layers' must be layer numbers"),
        (dict(select="reuse:every=0", cache="full"), "'every' must be at least 1"),
        (dict(select="reuse:of=sparsek", cache="full", top_k=68), "n_sink \\+ window"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseConfig(**fields)
