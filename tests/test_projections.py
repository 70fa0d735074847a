"""Queries, keys and values of a step as one product."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from builders import EXACT, SHAPES, feed, make_indexers, make_model, make_tokens
from mlx.utils import tree_flatten

from mlx_dsa import patch_sparse_generate
from mlx_dsa.projections import JoinedProjections

RULES = dict(EXACT, evict="window")


def make_attention(bits=None, bias=False):
    """Return an attention layer with matrices of three sizes."""
    layer = make_model(**SHAPES["gqa2"]).layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        rows, dim = layer[name].weight.shape
        layer[name] = nn.Linear(dim, rows, bias=bias)
        if bits:
            layer[name] = layer[name].to_quantized(group_size=32, bits=bits)
    return layer


def project(layer, x):
    return [layer[name](x) for name in ("q_proj", "k_proj", "v_proj")]


def is_close(ours, theirs):
    return all(a.shape == b.shape and np.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_they_are_the_layers_own(bits, bias):
    layer = make_attention(bits, bias)
    before = dict(tree_flatten(layer.parameters()))
    x = mx.random.normal((2, 1, layer.q_proj.weight.shape[1] * (32 // bits if bits else 1)))
    expected = project(layer, x)
    mx.eval(expected)
    joined = JoinedProjections(layer)
    joined.join()
    assert joined._joined is not None
    assert is_close(joined(x), expected)
    after = dict(tree_flatten(layer.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_nothing_is_in_memory_twice():
    layer = make_attention()
    mx.eval(layer.parameters())
    size = sum(layer[name].weight.nbytes for name in ("q_proj", "k_proj", "v_proj"))
    before = mx.get_active_memory()
    joined = JoinedProjections(layer)
    joined.join()
    assert mx.get_active_memory() - before < size / 4
    assert joined._joined.weight.nbytes == size


def replace_bias(layer):
    layer.v_proj.bias = layer.v_proj.bias + 1


def replace_scales(layer):
    layer.k_proj.scales = layer.k_proj.scales * 2


def replace_weight(layer):
    layer.q_proj.weight = mx.zeros_like(layer.q_proj.weight)


def add_adapter(layer):
    layer.v_proj = nn.Sequential(layer.v_proj, nn.ReLU())


def other_bits(layer):
    layer.k_proj = nn.Linear(64, 64).to_quantized(group_size=32, bits=8)


def other_dtype(layer):
    layer.set_dtype(mx.float16)


CHANGES = [replace_bias, replace_scales, replace_weight, add_adapter, other_bits, other_dtype]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_alike_or_was_replaced_runs_by_itself(change, late):
    layer = make_attention(bits=4, bias=True)
    x = mx.random.normal((1, 1, 64))
    if late:
        joined = JoinedProjections(layer)
        joined.join()
        stale = joined(x)
        change(layer)
        assert not is_close(stale, project(layer, x))
    else:
        change(layer)
        joined = JoinedProjections(layer)
        joined.join()
    ours = joined(x)
    assert (joined._joined is None) == (late or change in (add_adapter, other_bits))
    assert is_close(ours, project(layer, x))
    assert [a.dtype for a in ours] == [a.dtype for a in project(layer, x)]


def test_a_restored_patch_holds_no_weights():
    """Also where its object is still there, as the name of a with statement is."""
    model = make_model(**SHAPES["gqa2"])
    mx.eval(model.parameters())
    indexers = make_indexers(model)
    patches, in_use = [], []
    for _ in range(4):
        with patch_sparse_generate(model, indexers, **RULES) as patch:
            patches.append(patch)
        in_use.append(mx.get_active_memory())
    layer = model.layers[0].self_attn
    size = sum(layer[name].weight.nbytes for name in ("q_proj", "k_proj", "v_proj"))
    # Each patch has indexers of its own: a quarter of the joined weights of both layers.
    assert in_use[3] - in_use[2] < size


@pytest.mark.parametrize("cache", ["budget", "full", "tiered"])
def test_only_sparse_steps_use_them(monkeypatch, cache):
    """Until then the result is the dense model's, bit for bit."""
    model = make_model(**SHAPES["gqa2"])
    calls = []
    own = JoinedProjections.__call__
    monkeypatch.setattr(JoinedProjections, "__call__", lambda self, x: calls.append(1) or own(self, x))
    with patch_sparse_generate(model, make_indexers(model), **RULES, cache=cache):
        cache, _ = feed(model, make_tokens(20), 20)
        feed(model, make_tokens(4), 1, cache)
        assert cache[0].size() == 24 and len(calls) == 0
        feed(model, make_tokens(3), 1, cache)
        assert len(calls) == 3 * len(model.layers)
        feed(model, make_tokens(3), 3, cache)
        assert len(calls) == 3 * len(model.layers)
