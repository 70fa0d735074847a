"""Calibrations of random models, made without text."""

import mlx.core as mx
import numpy as np

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
