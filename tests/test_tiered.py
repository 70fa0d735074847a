"""A tiered cache selects what a full cache selects, and loses nothing."""

import mlx.core as mx
import pytest
from builders import EXACT, SHAPES, feed_calls, make_indexers, make_model, make_tokens
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import SparseConfig, patch_sparse_generate

# A long prompt, steps, a second turn longer than the budget, steps.
CALLS = [40, 23] + [1] * 20 + [30] + [1] * 300
LENGTH = sum(CALLS)


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"])
    return model, make_indexers(model)


def run(small, batch=1, **config):
    """Return the logits of a conversation and its caches."""
    model, indexers = small
    tokens = make_tokens(LENGTH, batch=batch)
    with patch_sparse_generate(model, indexers, **EXACT, **config):
        cache = make_prompt_cache(model)
        logits = feed_calls(model, tokens, CALLS, cache)
        out = mx.concatenate(logits, axis=1)
        mx.eval(out)
    return out, cache


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("store", ["memory", "file"])
def test_equals_the_full_cache(small, tmp_path, store, batch):
    option = {"cold_bits": 16}
    if store == "file":
        option = {"cold_file": str(tmp_path / "cold")}
    full, _ = run(small, batch, cache="full")
    tiered, cache = run(small, batch, cache="tiered", **option)
    assert mx.abs(full - tiered).max() < 5e-5
    assert cache[0].recalled > 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_file_holds_half_precision_bit_for_bit(tmp_path, dtype):
    model = make_model(**SHAPES["gqa2"], dtype=dtype)
    pair = model, make_indexers(model)
    memory, _ = run(pair, cache="tiered", cold_bits=16)
    file, _ = run(pair, cache="tiered", cold_file=str(tmp_path / "cold"))
    assert mx.array_equal(memory, file)


def test_fewer_bits_differ_more(small):
    full, _ = run(small, cache="full")
    errors = [mx.abs(full - run(small, cache="tiered", cold_bits=bits)[0]).mean().item() for bits in (16, 8, 4)]
    assert errors[0] < 1e-5 < errors[1] < errors[2]


def test_hot_entries_never_grow(small):
    model, indexers = small
    tokens = make_tokens(400)
    with patch_sparse_generate(model, indexers, **EXACT, cache="tiered"):
        cache = make_prompt_cache(model)
        feed_calls(model, tokens[:, :61], [59, 1, 1], cache)
        hot = {c.hot_nbytes for c in cache}
        for t in range(61, 400):
            mx.eval(model(tokens[:, t : t + 1], cache=cache))
            assert {c.hot_nbytes for c in cache} == hot
        assert all(c.size() == 400 and c.offset == 400 for c in cache)
        assert not cache[0].is_trimmable()


def test_budget_of_the_whole_length_is_dense(small):
    model, indexers = small
    tokens = make_tokens(50)
    dense = feed_calls(model, tokens, [30] + [1] * 20, make_prompt_cache(model))
    with patch_sparse_generate(model, indexers, top_k=70, cache="tiered"):
        tiered = feed_calls(model, tokens, [30] + [1] * 20, make_prompt_cache(model))
    assert mx.array_equal(mx.concatenate(dense, 1), mx.concatenate(tiered, 1))


def test_clear_begins_anew(small, tmp_path):
    model, indexers = small
    tokens = make_tokens(60)
    config = dict(EXACT, cache="tiered", cold_file=str(tmp_path / "cold"))
    with patch_sparse_generate(model, indexers, **config) as patch:
        cache = make_prompt_cache(model)
        first = feed_calls(model, tokens, [40] + [1] * 20, cache)
        mx.eval(first)
        patch()
        again = feed_calls(model, tokens, [40] + [1] * 20, cache)
        assert mx.array_equal(first[-1], again[-1])


def test_a_cold_file_is_never_overwritten_and_is_removed(small, tmp_path):
    model, indexers = small
    path = tmp_path / "cold"
    config = dict(EXACT, cache="tiered", cold_file=str(path))
    path.write_text("mine")
    with patch_sparse_generate(model, indexers, **config):
        with pytest.raises(ValueError, match="is not overwritten"):
            make_prompt_cache(model)
    assert path.read_text() == "mine"
    path.unlink()
    with patch_sparse_generate(model, indexers, **config):
        cache = make_prompt_cache(model)
        feed_calls(model, make_tokens(40), [39, 1], cache)
        assert path.exists()
        feed_calls(model, make_tokens(5), [1] * 5, cache)
    assert not path.exists()


def test_a_folder_that_is_missing_is_told(small, tmp_path):
    model, indexers = small
    config = dict(EXACT, cache="tiered", cold_file=str(tmp_path / "no" / "cold"))
    with patch_sparse_generate(model, indexers, **config):
        with pytest.raises(ValueError, match="can't be made"):
            make_prompt_cache(model)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(cold_bits=8), "for cache 'tiered' only"),
        (dict(cold_file="x", cache="full"), "for cache 'tiered' only"),
        (dict(cold_bits=5, cache="tiered"), "must be 4, 8 or 16"),
        (dict(cold_bits=8, cold_file="x", cache="tiered"), "no meaning"),
    ],
)
def test_options_that_would_be_ignored_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SparseConfig(**fields)
