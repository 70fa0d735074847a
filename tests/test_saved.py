"""Saved caches: the same answer after loading, and a refusal of anything else."""

import dataclasses
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from builders import SHAPES, SMALL_RULES, feed_calls, make_indexers, make_model, make_tokens
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

from mlx_dsa import SparseConfig, load_cache, patch_sparse_generate, save_cache
from mlx_dsa.saved import read_saved

RULES = dict(SMALL_RULES, evict="index")


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa4-untied"])
    return model, make_indexers(model)


def read(model, patch, length=60):
    cache = make_prompt_cache(model)
    feed_calls(model, make_tokens(length), [length], cache)
    patch.prune(cache)
    return cache


@pytest.mark.parametrize("config", [{}, {"cache": "full"}, {"dense_layers": (1,)}])
def test_goes_on_as_if_never_saved(small, tmp_path, config):
    model, indexers = small
    calls = [19] + [1] * 12
    rest = make_tokens(sum(calls), seed=9)
    with patch_sparse_generate(model, indexers, **RULES, **config) as patch:
        cache = read(model, patch)
        save_cache(tmp_path / "a.kv", cache, patch, {"title": "A book"})
        expected = mx.concatenate(feed_calls(model, rest, calls, cache), axis=1)
    with patch_sparse_generate(model, indexers, **RULES, **config) as patch:
        saved = load_cache(tmp_path / "a.kv", patch)
        again = mx.concatenate(feed_calls(model, rest, calls, saved.caches), axis=1)
        assert saved.tokens == 60 and saved.metadata == {"title": "A book"}
        assert mx.array_equal(expected, again)
        patch()
        assert all(c.empty() for c in saved.caches)


def test_a_cache_after_steps_is_saved_too(small, tmp_path):
    model, indexers = small
    rest = make_tokens(30, seed=9)
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        cache = read(model, patch)
        feed_calls(model, rest[:, :10], [1] * 10, cache)
        save_cache(tmp_path / "a.kv", cache, patch)
        expected = feed_calls(model, rest[:, 10:], [19, 1], cache)
        again = feed_calls(model, rest[:, 10:], [19, 1], load_cache(tmp_path / "a.kv", patch)[0])
        assert mx.array_equal(expected[-1], again[-1])


def test_other_weights_and_settings_are_refused(small, tmp_path):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        save_cache(tmp_path / "a.kv", read(model, patch), patch)

    def refused(model, indexers, says, **config):
        with patch_sparse_generate(model, indexers, **{**RULES, **config}) as patch:
            with pytest.raises(ValueError, match=says):
                load_cache(tmp_path / "a.kv", patch)

    refused(model, indexers, "top_k = 24", top_k=25)
    refused(model, indexers, "n_recent = 5", n_recent=6)
    refused(model, indexers, "evict = index", evict="window")
    refused(model, indexers, "cache = budget", cache="full")
    refused(model, make_indexers(model, seed=7), "other indexer weights")
    refused(make_model(**SHAPES["gqa4-untied"], seed=3), indexers, "other model weights")


MODEL = SHAPES["gqa4-untied"]
YARN = SHAPES["yarn"]["rope_scaling"]


def half(model):
    model.set_dtype(mx.float16)


def other_eps(model):
    model.layers[2].self_attn.k_norm.eps = 1e-5


def one_number(model):
    """Change the last bit of one weight of 3,232, which no sample need hit."""
    weight = model.model.embed_tokens.weight
    weight[57, 3] = mx.view(mx.view(weight[57, 3], mx.uint32) ^ 1, mx.float32)


def swapped_rows(model):
    weight = model.layers[1].mlp.up_proj.weight
    weight[3], weight[4] = mx.array(weight[4]), mx.array(weight[3])


@pytest.mark.parametrize(
    "shape, change, says",
    [
        (dict(rope_theta=1e6), None, "rope_theta = 10000.0 but the model has 1000000.0"),
        (dict(rope_scaling=YARN), None, "rope_scaling = None but the model has"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 4.0}), None, "rope_scaling"),
        (dict(quantized=True, hidden=64), None, "bits of a weight = None but the model has 4"),
        (dict(kind="qwen3_moe"), None, "model_type = qwen3 but the model has qwen3_moe"),
        (dict(heads=4, head_dim=32, kv_heads=1), None, "num_attention_heads = 8"),
        ({}, half, "dtype = float32 but the model has float16"),
        ({}, other_eps, "another form of model"),
        ({}, one_number, "other model weights"),
        ({}, swapped_rows, "other model weights"),
    ],
)
def test_whatever_decides_keys_and_values_is_told_and_refused(small, tmp_path, shape, change, says):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        save_cache(tmp_path / "a.kv", read(model, patch), patch)
    other = make_model(**{**MODEL, **shape})
    if change is not None:
        change(other)
    with patch_sparse_generate(other, indexers, **RULES) as patch:
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            load_cache(tmp_path / "a.kv", patch)
    assert "\n" not in str(error.value)
    same = make_model(**MODEL)
    with patch_sparse_generate(same, make_indexers(same), **RULES) as patch:
        assert load_cache(tmp_path / "a.kv", patch).tokens == 60


@pytest.mark.parametrize(
    "changes",
    [dict(rope_dim=6), dict(layers=(0, 2)), dict(retention_dim=4), dict(n_heads=6)],
)
def test_indexers_of_another_form_are_refused(small, tmp_path, changes):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        save_cache(tmp_path / "a.kv", read(model, patch), patch)
    with patch_sparse_generate(model, make_indexers(model, **changes), **RULES) as patch:
        with pytest.raises(ValueError, match="another form of indexer"):
            load_cache(tmp_path / "a.kv", patch)


@pytest.mark.parametrize("config", [{}, {"cache": "full", "dense_layers": (1,)}])
def test_the_settings_of_a_file_are_read_without_a_model(small, tmp_path, config):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES, **config) as patch:
        save_cache(tmp_path / "a.kv", read(model, patch), patch)
        saved = read_saved(tmp_path / "a.kv").config
    assert saved.keys() == {field.name for field in dataclasses.fields(SparseConfig)}
    assert SparseConfig.from_dict(saved) == patch.config
    assert patch.config == SparseConfig(**RULES, **config)


def test_foreign_and_older_files_are_told(small, tmp_path):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        good = save_cache(tmp_path / "a.kv", read(model, patch), patch)
        (tmp_path / "short.kv").write_bytes(good.read_bytes()[:-50])
        (tmp_path / "text.kv").write_text("not a cache")
        (tmp_path / "folder.kv").mkdir()
        mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
        old = {"format": "mlx-dsa cache 2", "tokens": "60"}
        mx.save_safetensors(str(tmp_path / "old.safetensors"), {"0.0": mx.zeros(3)}, old)
        for name, says in [
            ("none.kv", "there is no file"),
            ("folder.kv", "there is no file"),
            ("short.kv", "is damaged. Make it again"),
            ("text.kv", "is not a cache"),
            ("other.safetensors", "is not a cache"),
            ("old.safetensors", "by an earlier version of mlx-dsa. Make it again"),
        ]:
            for reads in (lambda path: load_cache(path, patch), read_saved):
                with pytest.raises(ValueError, match=says):
                    reads(tmp_path / name)


def damages(data, seed):
    """Yield 1,000 damaged forms of a file, of six kinds in turn."""
    rng = random.Random(seed)
    start = 8 + int.from_bytes(data[:8], "little")

    def flipped(low, high):
        at = rng.randrange(low, high)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]

    def replaced(make):
        at = rng.randrange(len(data))
        n = min(rng.choice([1, 2, 8, 100, 4096]), len(data) - at)
        return data[:at] + make(n) + data[at + n :]

    kinds = [
        lambda: flipped(0, start),
        lambda: flipped(start, len(data)),
        lambda: replaced(rng.randbytes),
        lambda: replaced(bytes),
        lambda: data[: rng.randrange(len(data))],
        lambda: data + rng.choice([rng.randbytes, bytes])(rng.randrange(1, 500)),
    ]
    n = 0
    while n < 1000:
        damaged = kinds[n % len(kinds)]()
        if damaged != data:
            n += 1
            yield damaged


@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_of_1000_damages_none_loads_and_each_is_one_line(small, tmp_path, dense_layers):
    model, indexers = small
    file = tmp_path / "a.kv"
    config = dict(RULES, top_k=12, dense_layers=dense_layers)
    with patch_sparse_generate(model, indexers, **config) as patch:
        save_cache(file, read(model, patch, 30), patch, {"checksum": '"checksum":"' + "0" * 64})
        data = file.read_bytes()
        assert len(data) < 60_000
        for damaged in damages(data, seed=len(dense_layers)):
            file.write_bytes(damaged)
            for reads in (lambda: load_cache(file, patch), lambda: read_saved(file)):
                with pytest.raises(ValueError, match="damaged. Make it again") as error:
                    reads()
                assert "\n" not in str(error.value)
        file.write_bytes(data)
        assert load_cache(file, patch).tokens == 30


def test_empty_and_tiered_caches_and_bad_places_are_refused(small, tmp_path):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        with pytest.raises(ValueError, match="empty"):
            save_cache(tmp_path / "a.kv", make_prompt_cache(model), patch)
        with pytest.raises(ValueError, match="can't be written"):
            save_cache(tmp_path / "no" / "a.kv", read(model, patch), patch)
    with patch_sparse_generate(model, indexers, **RULES, cache="tiered") as patch:
        cache = make_prompt_cache(model)
        feed_calls(model, make_tokens(60), [60], cache)
        with pytest.raises(ValueError, match="can't be saved"):
            save_cache(tmp_path / "a.kv", cache, patch)


@pytest.mark.parametrize(
    "config", [{}, {"cache": "full"}, {"cache": "tiered", "cold_bits": 16}, {"dense_layers": (0,)}]
)
def test_the_prompt_cache_file_of_mlx_lm_is_refused_in_saving(small, tmp_path, config):
    model, indexers = small
    file = tmp_path / "a.safetensors"
    save_prompt_cache(str(file), [KVCache()])
    before = file.read_bytes()
    with patch_sparse_generate(model, indexers, **RULES, **config) as patch:
        cache = read(model, patch)
        steps = generate_step(make_tokens(9)[0], model, max_tokens=3, prompt_cache=cache)
        assert len(list(steps)) == 3
        with pytest.raises(ValueError, match="mlx_dsa.save_cache") as error:
            save_prompt_cache(str(file), cache, {"model": "small"})
        assert "\n" not in str(error.value) and file.read_bytes() == before
        with pytest.raises(ValueError, match="mlx_dsa.save_cache"):
            [c.meta_state for c in cache if not isinstance(c, KVCache)]
    dense = make_prompt_cache(model)
    feed_calls(model, make_tokens(9), [9], dense)
    save_prompt_cache(str(file), dense)
    assert [c.offset for c in load_prompt_cache(str(file))] == [9, 9, 9]


SAVE_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[2])
from builders import SHAPES, make_indexers, make_model
from test_saved import RULES, read
from mlx_dsa import patch_sparse_generate, save_cache
model = make_model(**SHAPES["gqa4-untied"])
with patch_sparse_generate(model, make_indexers(model), **RULES) as patch:
    caches = [read(model, patch, 60), read(model, patch, 90)]
    while True:
        for cache in caches:
            save_cache(sys.argv[1], cache, patch)
            print("saved", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_kill_leaves_a_whole_file(small, tmp_path, delay):
    model, indexers = small
    path = tmp_path / "a.kv"
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(3):
            assert process.stdout.readline() == b"saved\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    with patch_sparse_generate(model, indexers, **RULES) as patch:
        assert load_cache(path, patch).tokens in (60, 90)
