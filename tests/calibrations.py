"""Calibrations of random models, made without text."""

import mlx.core as mx
import numpy as np
from builders import feed_calls, make_model, make_tokens
from mlx_lm.models.cache import make_prompt_cache
from simulate import generate_calls

from mlx_dsa import patch_sparse_generate
from mlx_dsa.calibrated import Calibration, digits_of
from mlx_dsa.families import family_of


def make_calibrations(model, kind, make, name="some/model"):
    """Return by layer what `make(layer, draw)` says was found, as NumPy arrays by name."""
    draw = np.random.default_rng(3)
    made = {}
    for i, layer in family_of(model).layers(model).items():
        found = {name: mx.array(a) for name, a in make(layer, draw).items()}
        made[i] = Calibration(kind, found, name, digits_of(layer))
    return made


def channels(layer, draw):
    order = [draw.permutation(layer.head_dim) for _ in range(layer.n_kv_heads)]
    return {"channels": np.array(order, np.int32)}


def patterns(layer, draw):
    every = draw.permutation(np.resize(np.arange(3), layer.n_kv_heads))
    return {"pattern": every.astype(np.int32), "vertical": draw.choice([0.1, 0.4, 0.9], layer.n_kv_heads)}


def windows(layer, draw):
    n = layer.n_kv_heads
    return {
        "alpha": draw.integers(-4, 12, n).astype(np.float32),
        "beta": draw.choice([0.0, 0.0625, 0.125], n).astype(np.float32),
    }


FOUND = {"double_sparsity": channels, "minference": patterns, "mixture": windows}


def calibrations_for(model, kind):
    return make_calibrations(model, kind, FOUND[kind])


def assert_dense_with_room(kind, select=None, **rules):
    """Where a rule has room for all keys the result is the dense one bit for bit, and not with less."""
    model, tokens = make_model(), make_tokens(60)
    calls = generate_calls(40, 16, 19)
    dense = feed_calls(model, tokens, calls, make_prompt_cache(model))
    rules = dict(n_sink=3, n_recent=5, prefill="exact", select=select or kind, **rules)
    for top_k, is_dense in ((60, True), (24, False)):
        with patch_sparse_generate(model, calibrations_for(model, kind), top_k, **rules):
            ours = feed_calls(model, tokens, calls, make_prompt_cache(model))
        same = [bool(mx.array_equal(a, b)) for a, b in zip(ours, dense)]
        assert all(same) if is_dense else not all(same)
