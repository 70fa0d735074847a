"""`sparse_attention` and `index_scores` against float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dsa import sparse_attention
from mlx_dsa.ops import index_scores, tile_scores
from mlx_dsa.ops import reference as reference_ops

# Largest difference to float64 of an output of order one.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def reference(queries, keys, values, indices, scale):
    """Attend one query at a time to the listed slots."""
    B, Hq, L, _ = queries.shape
    group = Hq // keys.shape[1]
    out = np.zeros((B, Hq, L, values.shape[-1]))
    for b, h, t in np.ndindex(B, Hq, L):
        slots = indices[b, t][indices[b, t] >= 0]
        weights = keys[b, h // group, slots] @ queries[b, h, t] * scale
        weights = np.exp(weights - weights.max())
        out[b, h, t] = weights / weights.sum() @ values[b, h // group, slots]
    return out


def inputs(B=2, Hq=4, Hkv=2, L=5, T=40, D=32, K=12, dtype=mx.float32, empty=0.0, seed=0):
    """Return arrays of the dtype, the same in float64, and slots as NumPy."""
    noise = np.random.default_rng(seed)
    shapes = [(B, Hq, L, D), (B, Hkv, T, D), (B, Hkv, T, D)]
    arrays = [mx.array(noise.standard_normal(s).astype(np.float32)) for s in shapes]
    arrays = [a.astype(dtype) for a in arrays]
    exact = [np.array(a.astype(mx.float32), dtype=np.float64) for a in arrays]
    slots = np.stack([np.stack([noise.permutation(T)[:K] for _ in range(L)]) for _ in range(B)]).astype(np.int32)
    blank = noise.random(slots.shape) < empty
    blank[..., K // 2] = False  # at least one key a query
    return arrays, exact, np.where(blank, -1, slots)


def check(**shape):
    """Compare for many keys too: few of them are gathered, not masked."""
    for T in (40, 700):
        arrays, exact, slots = inputs(T=T, **shape)
        scale = exact[0].shape[-1] ** -0.5
        out = sparse_attention(*arrays, mx.array(slots), scale=scale)
        assert out.dtype == arrays[0].dtype
        out = np.array(out.astype(mx.float32))
        gap = np.abs(out - reference(*exact, slots, scale))
        assert gap.max() < TOLERANCE[arrays[0].dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtype(dtype):
    check(dtype=dtype)


@pytest.mark.parametrize("Hq, Hkv", [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_head_groups(Hq, Hkv):
    check(Hq=Hq, Hkv=Hkv)


@pytest.mark.parametrize("L", [1, 2, 33])
@pytest.mark.parametrize("B", [1, 3])
def test_batch_and_length(B, L):
    check(B=B, L=L)


@pytest.mark.parametrize("D", [16, 64, 80, 128])
def test_head_dim(D):
    check(D=D)


@pytest.mark.parametrize("K", [1, 2, 29, 40])
def test_number_of_keys(K):
    check(K=K)


@pytest.mark.parametrize("empty", [0.2, 0.9, 1.0])
def test_empty_slots(empty):
    check(empty=empty, K=12)
    check(empty=empty, K=12, dtype=mx.float16)


@pytest.mark.parametrize("T", [40, 700])
def test_an_empty_slot_is_not_slot_zero_or_the_last(T):
    arrays, _, slots = inputs(T=T, K=12)
    slots[:, :, :6] = np.arange(5, 11)
    slots[:, :, 6:] = -1
    first = sparse_attention(*arrays, mx.array(slots), scale=0.2)
    for end in (0, T - 1):
        arrays[1][:, :, end] = 1e4
        arrays[2][:, :, end] = 1e4
    second = sparse_attention(*arrays, mx.array(slots), scale=0.2)
    assert mx.array_equal(first, second)


@pytest.mark.parametrize("T", [40, 700])
def test_a_query_with_no_key_is_zero(T):
    arrays, exact, slots = inputs(T=T)
    slots[1, 2] = -1
    out = np.array(sparse_attention(*arrays, mx.array(slots), scale=0.2))
    assert not out[1, :, 2].any()
    slots[1, 2, 0] = 0  # anything: only the other queries are compared
    gap = np.abs(out - reference(*exact, slots, 0.2))
    gap[1, :, 2] = 0
    assert gap.max() < 2e-6


def test_all_keys_are_dense_attention():
    arrays, _, slots = inputs(T=40, K=40, L=1)
    dense = mx.fast.scaled_dot_product_attention(*arrays, scale=0.2, mask=None)
    out = sparse_attention(*arrays, mx.array(slots), scale=0.2)
    assert mx.abs(out - dense).max() < 2e-6


def test_order_of_the_slots_does_not_matter():
    arrays, _, slots = inputs(empty=0.3)
    out = sparse_attention(*arrays, mx.array(slots), scale=0.2)
    back = sparse_attention(*arrays, mx.array(slots[..., ::-1].copy()), scale=0.2)
    assert mx.abs(out - back).max() < 2e-6


def test_comparison_sees_one_wrong_slot():
    arrays, exact, slots = inputs()
    expected = reference(*exact, slots, 0.2)
    missing = next(s for s in range(40) if s not in slots[0, 0])
    slots[0, 0, 3] = missing
    out = sparse_attention(*arrays, mx.array(slots), scale=0.2)
    assert np.abs(np.array(out) - expected).max() > 1e-2


def test_unknown_backend_is_refused():
    arrays, _, slots = inputs()
    with pytest.raises(ValueError, match="backend"):
        sparse_attention(*arrays, mx.array(slots), scale=0.2, backend="quantum")


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_a_backend_that_is_not_here_is_refused_when_it_is_used(backend):
    available = mx.metal.is_available() if backend == "metal" else mx.cuda.is_available()
    if available:
        pytest.skip(f"{backend} is available")
    arrays, _, slots = inputs()
    with pytest.raises(ValueError, match=backend):
        sparse_attention(*arrays, mx.array(slots), scale=0.2, backend=backend)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("B", [1, 2])
def test_gather_rows(B, on_cpu, monkeypatch):
    monkeypatch.setattr(reference_ops, "on_cpu", lambda: on_cpu)
    rows = np.random.default_rng(0).normal(size=(B, 3, 40, 8)).astype(np.float32)
    slots = np.random.default_rng(1).integers(0, 40, (B, 12)).astype(np.int32)
    expected = np.stack([rows[b][:, slots[b]] for b in range(B)])
    gathered = reference_ops.gather_rows(mx.array(rows), mx.array(slots))
    assert np.array_equal(np.array(gathered), expected)
    assert memoryview(gathered).c_contiguous  # heads lie before rows, as in a cache


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize("Hi, Di", [(1, 4), (3, 12), (6, 69)])
def test_index_scores(Hi, Di, L, dtype):
    noise = np.random.default_rng(0)
    B, T = 2, 50
    shapes = [(B, Hi, L, Di), (B, L, Hi), (B, 1, T, Di)]
    arrays = [mx.array(noise.standard_normal(s).astype(np.float32)) for s in shapes]
    arrays = [a.astype(dtype) for a in arrays]
    q, w, k = [np.array(a.astype(mx.float32), dtype=np.float64) for a in arrays]
    expected = np.einsum("blh,bhlt->blt", w, np.maximum(np.einsum("bhld,btd->bhlt", q, k[:, 0]), 0))
    scores = index_scores(*arrays)
    assert scores.dtype == mx.float32 and scores.shape == (B, L, T)
    gap = np.abs(np.array(scores) - expected).max() / np.abs(expected).max()
    assert gap < TOLERANCE[dtype]


def test_index_scores_are_summed_in_float32():
    # In half precision 2048 + 1 is 2048: a head would be lost.
    queries = mx.ones((1, 3, 1, 1), mx.float16)
    weights = mx.array([[[2048.0, 1.0, 1.0]]], mx.float16)
    scores = index_scores(queries, weights, mx.ones((1, 1, 4, 1), mx.float16))
    assert scores.tolist() == [[[2050.0] * 4]]


def tile_inputs(L=32, T=300, seed=0):
    noise = np.random.default_rng(seed)
    shapes = [(1, 3, L, 12), (1, L, 3), (1, 1, T, 12)]
    return [mx.array(noise.standard_normal(s).astype(np.float32)) for s in shapes]


@pytest.mark.parametrize("T", [300, 17, 16, 1])
def test_tile_scores_count_from_the_level_of_each_query(T, monkeypatch):
    queries, weights, keys = tile_inputs(T=T)
    first = T // 3
    scores = np.array(index_scores(queries, weights, keys), dtype=np.float64)[0]
    expected = []
    for tile, n in enumerate([first, first + 16]):
        rows = scores[16 * tile : 16 * tile + 16]
        sample = rows[:, :n][:, 16::32]
        levels = np.log(np.exp(sample).sum(1)) if sample.size else np.zeros(16)
        expected.append((rows - levels[:, None]).max(0))
    arrays = queries, weights, keys, 16, first
    assert np.allclose(np.array(tile_scores(*arrays))[0], expected, atol=1e-4)
    # A tile at a time, as where blocks are split.
    monkeypatch.setattr(reference_ops, "BLOCK_BYTES", 1)
    assert np.allclose(np.array(tile_scores(*arrays))[0], expected, atol=1e-4)


def test_a_query_of_high_scores_does_not_choose_for_its_tile():
    """Head weights that are all larger by a factor, for a query that is indifferent."""
    queries, weights, keys = tile_inputs(L=2)
    keys = mx.concatenate([mx.full((1, 1, 300, 1), 5.0), keys], axis=-1)
    loud = mx.array([20.0, 0.0])[None, None, :, None] * mx.ones((1, 3, 2, 1))
    plain = mx.concatenate([0 * loud, queries], axis=-1)
    offset = mx.concatenate([loud, queries * mx.array([0.01, 1.0])[:, None]], axis=-1)
    weights = mx.abs(weights)

    def best(queries):
        scores = tile_scores(queries, weights, keys, 2, 300)
        return set(mx.argsort(-scores[0, 0])[:20].tolist())

    # The second query's choice, although the first scores every key far higher.
    second = index_scores(plain, weights, keys)[0, 1]
    own = set(mx.argsort(-second)[:20].tolist())
    assert len(best(offset) & own) >= 18
    raw = index_scores(offset, weights, keys)[0].max(axis=0)
    assert len(set(mx.argsort(-raw)[:20].tolist()) & own) < 10


def test_levels_do_not_look_beyond_open_keys():
    queries, weights, keys = tile_inputs(L=16)
    changed = mx.concatenate([keys[:, :, :100], 9 * keys[:, :, 100:]], axis=2)
    before, after = (tile_scores(queries, weights, k, 16, 100)[..., :100] for k in (keys, changed))
    assert mx.array_equal(before, after)
