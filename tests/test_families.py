"""What holds for a model of any family."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from builders import EXACT, VOCAB, feed, feed_calls, layer_of, make_tokens
from family_models import FAMILIES, family_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import (
    Indexer,
    IndexerArgs,
    load_cache,
    load_indexers,
    patch_sparse_generate,
    save_cache,
    save_indexers,
)
from mlx_dsa.cli.stats import measure
from mlx_dsa.evals.generation import take_rows
from mlx_dsa.families import family_of, model_types, positions_of
from mlx_dsa.train.teacher import layer_views

ROUNDING = 2e-4


def indexers_for(model, retention_dim=8):
    layers = family_of(model).layers(model)
    mx.random.seed(1)
    args = IndexerArgs(layers[min(layers)].hidden_size, 3, 12, 8, retention_dim=retention_dim)
    return {i: Indexer(args) for i in layers}


def distinct(length, *seeds):
    """Return rows of tokens, none twice in a row: what two of one are worth differs by rounding."""
    rows = [np.random.default_rng(seed).permutation(VOCAB)[:length] for seed in seeds]
    return mx.array(np.stack(rows).astype(np.int32))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return family_model(name)


def test_every_family_has_a_row():
    assert {kind for kind, _ in FAMILIES.values()} == set(model_types())


def test_layers_are_those_with_attention(name, model):
    layers = family_of(model).layers(model)
    hybrid = name in ("qwen3_next", "qwen3_5", "qwen3_5_moe")
    assert list(layers) == ([1, 3] if hybrid else [0, 1])
    for layer in layers.values():
        assert layer.hidden_size == 64 and layer.n_heads == 4
        assert layer.module.k_proj.weight.shape[0] == layer.n_kv_heads * layer.head_dim


def test_a_layer_projects_and_attends_as_mlx_lm_does(model):
    """The same operations: the same bits."""
    for layer in family_of(model).layers(model).values():
        x = mx.random.normal((2, 40, 64))
        queries, keys, values, gate = layer.project(x)
        attended = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=layer.scale, mask="causal")
        assert mx.array_equal(layer.output(attended, gate), layer.module(x, "causal"))


def test_hidden_states_and_logits_are_the_models(model):
    family, tokens = family_of(model), make_tokens(30)
    hidden = family.hidden(model, tokens, make_prompt_cache(model))
    assert mx.array_equal(family.logits(model, hidden), model(tokens))


@pytest.mark.parametrize("cache", ["budget", "full", "tiered"])
def test_dense_bit_for_bit_while_all_keys_fit(model, cache):
    tokens = make_tokens(120)
    for chunk in (120, 64, 7, 1):
        _, dense = feed(model, tokens, chunk)
        with patch_sparse_generate(model, indexers_for(model), 120, n_recent=8, cache=cache):
            _, sparse = feed(model, tokens, chunk)
        assert mx.array_equal(sparse, dense), chunk
    with patch_sparse_generate(model, indexers_for(model), **{**EXACT, "cache": cache}):
        _, sparse = feed(model, tokens, 120)
    assert not mx.array_equal(sparse, dense)


@pytest.mark.parametrize("cache", ["budget", "full"])
def test_chunks_give_one_answer(model, cache):
    prompt = distinct(98, 1)[0]
    rows = {}
    with patch_sparse_generate(model, indexers_for(model), **EXACT, cache=cache):
        for step in (2048, 48, 32, 7, 1):
            steps = generate_step(prompt, model, max_tokens=5, prefill_step_size=step)
            rows[step] = np.stack([np.array(p) for _, p in steps])
    assert all(np.abs(row - rows[2048]).max() < ROUNDING for row in rows.values())


def test_a_row_of_a_batch_answers_as_alone(model):
    tokens = distinct(70, 1, 2)
    calls = [60] + [1] * 10
    with patch_sparse_generate(model, indexers_for(model), **EXACT):
        both = mx.concatenate(feed_calls(model, tokens, calls, make_prompt_cache(model)), axis=1)
        for row in (0, 1):
            alone = feed_calls(model, tokens[row : row + 1], calls, make_prompt_cache(model))
            assert mx.abs(mx.concatenate(alone, axis=1)[0] - both[row]).max() < ROUNDING


def test_steps_keep_to_the_budget_and_copies_go_on(model):
    tokens = make_tokens(100)
    with patch_sparse_generate(model, indexers_for(model), **EXACT) as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, tokens, [60] + [1] * 20, cache)
        assert all(cache[i].size() == 24 and cache[i].offset == 80 for i in patch.layers)
        other = copy.deepcopy(cache)
        rest = [feed_calls(model, tokens[:, 80:], [1] * 20, c)[-1] for c in (cache, other)]
        assert mx.array_equal(*rest)
        patch()
        feed_calls(model, tokens, [60] + [1] * 20, cache)  # cleared, whatever a layer keeps
        again = feed_calls(model, tokens[:, 80:], [1] * 20, cache)[-1]
    assert mx.abs(again - rest[0]).max() < ROUNDING


@pytest.mark.parametrize("cache", ["budget", "full"])
def test_a_saved_cache_goes_on(model, cache, tmp_path):
    tokens = make_tokens(90)
    with patch_sparse_generate(model, indexers_for(model), **EXACT, cache=cache) as patch:
        caches = make_prompt_cache(model)
        feed_calls(model, tokens, [60] + [1] * 9, caches)
        save_cache(tmp_path / "a.kv", caches, patch)
        saved = load_cache(tmp_path / "a.kv", patch)
        assert saved.tokens == 69
        rest = [feed_calls(model, tokens[:, 69:], [1] * 21, c)[-1] for c in (caches, saved.caches)]
    assert mx.array_equal(*rest)
    report = measure(caches, None, None)
    assert report.seen == 90 and report.kept[1] == (24 if cache == "budget" else 90)


def test_evaluators_take_rows_of_a_batch(model):
    both = distinct(60, 1, 2)
    batch, tokens = both[:, :50], both[1:, 50:]
    with patch_sparse_generate(model, indexers_for(model), **EXACT):
        two, one = make_prompt_cache(model), make_prompt_cache(model)
        feed_calls(model, batch, [40] + [1] * 10, two)
        feed_calls(model, batch[1:], [40] + [1] * 10, one)
        rows = take_rows(two, [1])
        ours, theirs = (feed_calls(model, tokens, [1] * 10, c)[-1] for c in (rows, one))
    assert mx.abs(ours - theirs).max() < ROUNDING


def test_restore_is_bit_exact(model):
    before = tree_map(mx.array, model.parameters())
    tokens = make_tokens(60)
    dense = model(tokens)
    caches = [type(c) for c in make_prompt_cache(model)]
    with patch_sparse_generate(model, indexers_for(model), **EXACT):
        feed_calls(model, tokens, [50] + [1] * 10, make_prompt_cache(model))
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == [n for n, _ in tree_flatten(before)]
    assert all(mx.array_equal(after[n], a) for n, a in tree_flatten(before))
    assert mx.array_equal(model(tokens), dense)
    assert [type(c) for c in make_prompt_cache(model)] == caches


def test_the_teacher_sees_what_the_attention_does(model):
    """Its hidden states are those of the model itself, read at once."""
    tokens, seen = make_tokens(90), {}

    class Listener(nn.Module):
        def __init__(self, i, attention):
            super().__init__()
            self.i, self.attention = i, attention

        def __call__(self, x, mask=None, cache=None):
            seen[self.i] = x
            return self.attention(x, mask, cache)

    layers = family_of(model).layers(model)
    views = dict(layer_views(model, tokens, 32))
    for i, layer in layers.items():
        layer.put(Listener(i, layer.module))
    model(tokens)
    for i, layer in layers.items():
        layer.put(layer.module)
        assert mx.abs(views[i].x - seen[i]).max() < ROUNDING
        assert views[i].queries.shape == (1, 4, 90, layer.head_dim)
    assert list(views) == list(layers)


# Indexers that fit every copy of a model.


def rescale(model, seed=3):
    """Scale a model by channel between its norms and what comes after: the same function."""
    rng = np.random.default_rng(seed)
    for block in model.layers:
        if "self_attn" not in block:
            continue
        by = mx.array(np.exp(rng.normal(0, 1, 64)).astype(np.float32))
        block.input_layernorm.weight = block.input_layernorm.weight * by
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn[name].weight = block.self_attn[name].weight / by
    mx.eval(model.parameters())


def selections(model, indexers, tokens):
    """Return the selected slots and retention scores of every attention layer."""
    layers, found = family_of(model).layers(model), []
    for i, view in layer_views(model, tokens, 512):
        bound = indexers[i].bind(layers[i])
        scores = np.array(bound.scores(view.x, bound.project_keys(view.x)))[0]
        chosen = np.argsort(-scores[64:], axis=-1)[:, :32]
        found.append((chosen, np.array(bound.retention(view.x))[0]))
    return found


def overlap(one, other):
    return np.mean([len(set(a) & set(b)) / len(a) for (x, _), (y, _) in zip(one, other) for a, b in zip(x, y)])


def test_unweighted_indexers_select_alike_on_a_rescaled_copy(name, tmp_path):
    model, copied = family_model(name), family_model(name)
    rescale(copied)
    tokens = make_tokens(200)
    gap = mx.abs(model(tokens) - copied(tokens)).max().item()
    assert gap < 1e-3
    layers = family_of(model).layers(model)
    weighted = indexers_for(model)
    save_indexers(tmp_path, {i: w.unweighted(layers[i]) for i, w in weighted.items()})
    unweighted = load_indexers(tmp_path)
    assert all(u.args.unweighted for u in unweighted.values())
    here = selections(model, weighted, tokens)
    for of_model in (model, copied):
        there = selections(of_model, unweighted, tokens)
        assert overlap(here, there) > 0.999
        assert all(np.abs(a - b).max() < 1e-3 for (_, a), (_, b) in zip(here, there))
    # What the form is for: the others do not.
    assert overlap(here, selections(copied, weighted, tokens)) < 0.9


def test_a_channel_that_the_norm_silences_counts_for_nothing():
    model = family_model("qwen2")
    weight = np.array(model.layers[0].input_layernorm.weight)
    weight[5] = 0
    model.layers[0].input_layernorm.weight = mx.array(weight)
    layer = layer_of(model)
    indexer = indexers_for(model)[0]
    bound = indexer.unweighted(layer).bind(layer)
    x = layer.normalise(mx.random.normal((1, 20, 64)))
    ours, theirs = (i.scores(x, i.project_keys(x)) for i in (bound, indexer.bind(layer)))
    assert mx.isfinite(ours).all() and mx.abs(ours - theirs).max() < 1e-4


# Refused by name.


@pytest.mark.parametrize(
    "kind, reason",
    [("gemma3_text", "sliding window"), ("gpt_oss", "sinks"), ("gemma3n", "share keys and values")],
)
def test_models_that_it_can_not_be_right_for_are_refused_with_a_reason(kind, reason):
    model = family_model("llama")
    model.model_type = kind
    with pytest.raises(ValueError, match=f"{kind}.*{reason}.*Run it dense"):
        patch_sparse_generate(model, {}, **EXACT)


def test_llamas_with_sliding_windows_are_refused():
    layers = ["full_attention", "sliding_attention"]
    model = family_model("llama", layer_types=layers, sliding_window=32)
    with pytest.raises(ValueError, match="sliding window"):
        family_of(model)


def test_indexers_for_a_layer_without_attention_are_refused():
    model = family_model("qwen3_next")
    indexers = indexers_for(model)
    with pytest.raises(ValueError, match="with attention, 1, 3, but got layer 0"):
        patch_sparse_generate(model, {**indexers, 0: indexers[1]}, **EXACT)


def test_positions_are_those_that_mlx_lm_builds():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    sizes = dict(rope_scaling=scaling, max_position_embeddings=2048)
    assert positions_of(family_model("qwen3", **sizes)) == 8192
    # mlx-lm builds this one without the scaling of its config.
    assert positions_of(family_model("qwen3_moe", **sizes)) == 2048
    moe = family_model("qwen3_moe", **sizes)
    assert family_of(moe).layers(moe)[0].rope.scaling is None
    stranger = family_model("qwen3", **sizes)
    stranger.model_type = "stranger"
    assert positions_of(stranger) == 8192
