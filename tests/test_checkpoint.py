"""Indexers on disk in 8 bits: half the size, the same selections."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dsa import Indexer, IndexerArgs, load_indexers, save_indexers


def make(seed=0, **changes):
    mx.random.seed(seed)
    args = IndexerArgs(**{**dict(dim=128, index_n_heads=2, index_head_dim=32, index_rope_dim=16), **changes})
    return {0: Indexer(args), 3: Indexer(args)}


def chosen(indexer, k=32, length=256):
    x = mx.random.normal((1, length, 128), key=mx.random.key(5))
    scores = indexer.scores(x[:, -64:], indexer.project_keys(x), length - 64)[0]
    return [set(row) for row in np.array(mx.argpartition(-scores, k - 1, axis=-1)[:, :k])]


@pytest.mark.parametrize("shape", [{}, {"retention_dim": 8}, {"norm": True, "unweighted": True}])
def test_eight_bits_select_alike_in_half_the_room(shape, tmp_path):
    indexers = make(**shape)
    plain = save_indexers(tmp_path / "plain", indexers)
    small = save_indexers(tmp_path / "small", indexers, {"note": 1}, bits=8)
    assert small.stat().st_size < 0.35 * plain.stat().st_size  # of float32
    loaded = load_indexers(tmp_path / "small")
    assert loaded.keys() == indexers.keys() and loaded[3].args == load_indexers(plain)[3].args
    for layer, indexer in loaded.items():
        own = dict(tree_flatten(indexers[layer].parameters()))
        for name, value in tree_flatten(indexer.parameters()):
            assert value.dtype == mx.float16 and value.shape == own[name].shape
            assert mx.abs(value - own[name]).max() < 0.01 * mx.abs(own[name]).max() + 1e-3
        pairs = list(zip(chosen(indexer), chosen(indexers[layer])))
        assert np.mean([len(a & b) / len(a) for a, b in pairs]) > 0.97
    # Layers are not alike, so this tells something.
    pairs = list(zip(chosen(loaded[0]), chosen(loaded[3])))
    assert np.mean([len(a & b) / len(a) for a, b in pairs]) < 0.6
    assert json.loads((tmp_path / "small" / "run_config.json").read_text())["note"] == 1


def test_what_is_stored_in_eight_bits_is_stored_again_the_same(tmp_path):
    save_indexers(tmp_path / "one", make(), bits=8)
    one = load_indexers(tmp_path / "one")
    save_indexers(tmp_path / "two", one)
    for layer, indexer in load_indexers(tmp_path / "two").items():
        for (_, a), (_, b) in zip(tree_flatten(indexer.parameters()), tree_flatten(one[layer].parameters())):
            assert mx.array_equal(a, b)


def test_other_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'bits' must be None or 8 but got 4"):
        save_indexers(tmp_path / "x", make(), bits=4)
    assert not (tmp_path / "x").exists()
    file = save_indexers(tmp_path / "y", make(), bits=8)
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    assert header["__metadata__"]["bits"] == "8"
    header["__metadata__"]["bits"] = "3"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(ValueError, match="matrices of '3' bits that this version does not know"):
        load_indexers(file)


@pytest.mark.parametrize("lost", [".scales", ".biases"])
def test_a_file_that_lacks_a_part_of_a_matrix_is_refused(lost, tmp_path):
    file = save_indexers(tmp_path, make(), bits=8)
    arrays, header = mx.load(str(file), return_metadata=True)
    del arrays[f"layers.3.wk.weight{lost}"]
    mx.save_safetensors(str(file), arrays, header)
    with pytest.raises(ValueError, match="layer 3 of .* does not fit"):
        load_indexers(file)
