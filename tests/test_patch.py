"""What patching changes, that restoring undoes it, and what is refused."""

import mlx.core as mx
import pytest
from builders import EXACT, SHAPES, VOCAB, feed, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_dsa import BudgetKVCache, Indexer, IndexerArgs, SparseConfig, patch_sparse_generate


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def indexers(model):
    return make_indexers(model)


def attentions(model):
    return [layer.self_attn for layer in model.layers]


def parameters(model):
    """Return names and copies of all parameters, and the modules that hold them."""
    copies = tree_map(lambda p: mx.array(p), model.parameters())
    return dict(tree_flatten(copies)), attentions(model), model.training


def assert_same(model, before, logits, tokens):
    """Hold a model to what `parameters` and a dense run said before."""
    arrays, modules, training = before
    after, _, _ = parameters(model)
    assert list(after) == list(arrays)
    assert all(mx.array_equal(after[name], arrays[name]) for name in arrays)
    assert all(a is b for a, b in zip(attentions(model), modules, strict=True))
    assert model.training == training
    assert not hasattr(model, "make_cache")
    assert all(type(c) is KVCache for c in make_prompt_cache(model))
    assert mx.array_equal(feed(model, tokens, 64)[1], logits)


@pytest.mark.parametrize("shape", ["gqa2", "4bit", "moe", "moe-4bit"])
def test_restore_is_bit_exact(shape):
    model = make_model(**SHAPES[shape])
    tokens = make_tokens(90)
    before = parameters(model)
    _, dense = feed(model, tokens, 64)

    patch = patch_sparse_generate(model, make_indexers(model), **EXACT)
    _, sparse = feed(model, tokens, 64)
    assert mx.abs(sparse - dense).max() > 1e-2
    patch.restore()
    assert_same(model, before, dense, tokens)
    patch.restore()  # twice does nothing
    assert_same(model, before, dense, tokens)

    with patch_sparse_generate(model, make_indexers(model), **EXACT) as patch:
        assert mx.array_equal(feed(model, tokens, 64)[1], sparse)
    assert_same(model, before, dense, tokens)


def test_restore_after_an_exception(model, indexers):
    tokens = make_tokens(90)
    before = parameters(model)
    _, dense = feed(model, tokens, 64)
    with pytest.raises(KeyboardInterrupt):
        with patch_sparse_generate(model, indexers, **EXACT):
            feed(model, tokens, 64)
            raise KeyboardInterrupt
    assert_same(model, before, dense, tokens)


def test_restore_after_a_failing_layer(model, indexers):
    tokens = make_tokens(90)
    before = parameters(model)
    _, dense = feed(model, tokens, 64)
    with pytest.raises(ValueError):
        with patch_sparse_generate(model, indexers, **EXACT):
            model(tokens, cache=[KVCache() for _ in model.layers])
    assert_same(model, before, dense, tokens)


def test_a_later_patch_is_not_undone_by_an_earlier_one(model, indexers):
    first = patch_sparse_generate(model, indexers, **EXACT)
    first.restore()
    second = patch_sparse_generate(model, indexers, **EXACT)
    first.restore()
    assert [layer.self_attn for layer in model.layers] == list(second.layers.values())
    assert all(type(c) is BudgetKVCache for c in make_prompt_cache(model))


def test_indexers_are_left_as_they_are(model, indexers):
    before = {i: dict(tree_flatten(x.parameters())) for i, x in indexers.items()}
    bases = {i: x.args.rope_theta for i, x in indexers.items()}
    with patch_sparse_generate(model, indexers, **EXACT):
        feed(model, make_tokens(60), 30)
    for i, x in indexers.items():
        after = dict(tree_flatten(x.parameters()))
        assert all(mx.array_equal(after[n], a) for n, a in before[i].items())
        assert x.args.rope_theta == bases[i]


def test_what_a_patch_shows(model, indexers):
    with patch_sparse_generate(model, indexers, **EXACT) as patch:
        assert isinstance(patch.config, SparseConfig) and patch.config.top_k == 24
        assert list(patch.layers) == [0, 1]
        assert all(model.layers[i].self_attn is x for i, x in patch.layers.items())
        assert all(type(c) is BudgetKVCache for c in patch.make_cache())


# What is refused.


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(top_k=0), "top_k"),
        (dict(top_k=-3), "top_k"),
        (dict(top_k=2.5), "top_k"),
        (dict(top_k=67), "top_k"),  # below 4 sinks + 64 recent
        (dict(top_k=100, prefill="tile"), "tile"),
        (dict(prefill="fast"), "prefill"),
        (dict(cache="rotating"), "cache"),
        (dict(evict="chance"), "evict"),
        (dict(backend="abacus"), "backend"),
        (dict(backend=None), "backend"),
        (dict(n_recent=-1), "n_recent"),
        (dict(observation_window=0), "observation_window"),
        (dict(tile_size=0), "tile_size"),
        (dict(budget=3), "budget"),
        (dict(dense_layers=3), "dense_layers"),
        (dict(dense_layers=(2,)), "layer"),
        (dict(dense_layers=(0, 1)), "sparse|dense_layers"),
    ],
)
def test_bad_config_leaves_the_model_alone(model, indexers, config, says):
    before = attentions(model)
    with pytest.raises(ValueError, match=says):
        patch_sparse_generate(model, indexers, **config)
    assert all(a is b for a, b in zip(attentions(model), before))
    assert not hasattr(model, "make_cache")


def test_indexers_that_do_not_fit(model, indexers):
    before = attentions(model)
    wide = make_indexers(make_model(hidden=96))
    with pytest.raises(ValueError, match="hidden_size"):
        patch_sparse_generate(model, {0: indexers[0], 1: wide[1]}, **EXACT)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match="layer"):
            patch_sparse_generate(model, {layer: indexers[0]}, **EXACT)
    with pytest.raises(ValueError, match="indexers"):
        patch_sparse_generate(model, {}, **EXACT)
    assert all(a is b for a, b in zip(attentions(model), before))


def test_other_models_are_refused(indexers):
    from mlx_lm.models import phi

    model = phi.Model(phi.ModelArgs(hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="qwen3.*llama.* but got 'phi'"):
        patch_sparse_generate(model, indexers, **EXACT)


def test_patching_twice_is_refused(model, indexers):
    tokens = make_tokens(60)
    with patch_sparse_generate(model, indexers, **EXACT):
        _, sparse = feed(model, tokens, 60)
        with pytest.raises(ValueError, match="already patched"):
            patch_sparse_generate(model, indexers, **EXACT)
        assert mx.array_equal(feed(model, tokens, 60)[1], sparse)


def test_patching_twice_is_refused_where_one_layer_is_sparse(model, indexers):
    with patch_sparse_generate(model, {1: indexers[1]}, **EXACT):
        with pytest.raises(ValueError, match="already patched"):
            patch_sparse_generate(model, {0: indexers[0]}, **EXACT)


@pytest.mark.parametrize("cache", ["budget", "full"])
@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_kv_bits_and_max_kv_size_are_refused(cache, layers):
    model = make_model(head_dim=64)  # what mlx-lm itself can quantise
    prompt = make_tokens(40)[0]
    indexers = make_indexers(model, layers=layers)
    with patch_sparse_generate(model, indexers, **EXACT, cache=cache):
        with pytest.raises(ValueError, match="kv_bits"):
            list(generate_step(prompt, model, max_tokens=2, kv_bits=4))
        with pytest.raises(ValueError, match="max_kv_size"):
            list(generate_step(prompt, model, max_tokens=2, max_kv_size=64))
        with pytest.raises(ValueError, match="max_kv_size"):
            make_prompt_cache(model, 64)
        assert len(list(generate_step(prompt, model, max_tokens=2))) == 2
    # A dense model still takes both.
    list(generate_step(prompt, model, max_tokens=2, max_kv_size=64))


def test_an_empty_prompt_is_refused(model, indexers):
    with patch_sparse_generate(model, indexers, **EXACT):
        with pytest.raises(ValueError, match="prompt"):
            next(generate_step(mx.array([], mx.int32), model))


def test_caches_of_the_other_kind_are_refused(model, indexers):
    tokens = make_tokens(10)
    dense = make_prompt_cache(model)
    with patch_sparse_generate(model, indexers, **EXACT):
        sparse = make_prompt_cache(model)
        with pytest.raises(ValueError, match="cache"):
            model(tokens, cache=dense)
    with pytest.raises(ValueError, match="make_prompt_cache"):
        model(tokens, cache=sparse)


@pytest.mark.parametrize("norm", [False, True])
def test_published_parameter_counts(norm):
    indexer = Indexer(IndexerArgs(4096, 6, 69, 64, norm=norm))
    count = sum(p.size for _, p in tree_flatten(indexer.parameters()))
    assert count == 2_003_427
    assert 36 * count == 72_123_372
