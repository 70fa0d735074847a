"""Every kernel equals the reference: on the GPU there is, and emulated on the CPU."""

import emulation
import mlx.core as mx
import numpy as np
import pytest
from builders import feed, make_indexers, make_model, make_tokens

from mlx_dsa import crossovers, ops, patch_sparse_generate
from mlx_dsa.ops import backends, gpu, reference

# Largest difference, as a share of the largest value: two roundings.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# Scores are float32, but a GPU's reference may round their products' inputs to tf32.
SCORES = mx.float32 if mx.default_device() == mx.cpu else mx.float16
LANGUAGES = ["metal-emulated", "cuda-emulated", "metal", "cuda"]


@pytest.fixture(params=LANGUAGES)
def language(request, monkeypatch):
    """Choose where kernels run; tests skip what is not here."""
    name = request.param.partition("-")[0]
    if request.param.endswith("emulated"):
        if emulation.COMPILER is None:
            pytest.skip("no C++ compiler here to emulate kernels with")
        monkeypatch.setattr(gpu, "launch", emulation.launch)
        monkeypatch.setattr(backends, "device_language", lambda: name)
    elif backends.device_language() != name:
        pytest.skip(f"MLX does not run on a {name} device here")
    return name


def noise(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)


def wide(*arrays):
    return [a.astype(mx.float32) for a in arrays]


def assert_near(result, expected, dtype):
    result, expected = np.array(wide(result)[0]), np.array(expected)
    assert result.shape == expected.shape
    # Not "gap > limit": that is false of NaN.
    assert np.abs(result - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def scoring(B, Hi, Di, L, T, dtype):
    arrays = noise(B, Hi, L, Di), noise(B, L, Hi), noise(B, 1, T, Di)
    return [a.astype(dtype) for a in arrays]


def runs(language, dtype):
    """Return whether a kernel of the language takes the dtype."""
    return not (language == "cuda" and dtype == mx.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "B, Hi, Di, tile, n_tiles, T",
    [
        (1, 6, 69, 64, 2, 333),
        (2, 4, 32, 16, 3, 70),
        (1, 6, 69, 17, 1, 260),
        (1, 1, 5, 1, 3, 40),
        (1, 2, 128, 50, 2, 1),
        (2, 12, 69, 20, 3, 97),  # on CUDA 8 queries at a time, not 16
    ],
)
def test_tile_scores(language, dtype, B, Hi, Di, tile, n_tiles, T):
    if not runs(language, dtype):
        pytest.skip("the CUDA kernel leaves float32 to the reference")
    arrays = scoring(B, Hi, Di, tile * n_tiles, T, dtype)
    sizes = tile, 10  # levels: of nothing for the first tile
    scores = gpu.tile_scores(language, *arrays, *sizes)
    assert scores.dtype == mx.float32
    assert_near(scores, reference.tile_scores(*wide(*arrays), *sizes), SCORES)


# A kernel is compiled for up to 16 queries, and for more.
SCORED = [(1, 6, 69, 1, 300), (1, 2, 20, 16, 70), (1, 2, 20, 17, 70), (2, 4, 32, 75, 130)]


@pytest.mark.parametrize("B, Hi, Di, L, T", SCORED)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_index_scores(language, dtype, B, Hi, Di, L, T):
    if not runs(language, dtype):
        pytest.skip("the CUDA kernel leaves float32 to the reference")
    arrays = scoring(B, Hi, Di, L, T, dtype)
    scores = gpu.index_scores(language, *arrays)
    assert_near(scores, reference.index_scores(*wide(*arrays)), SCORES)


def test_a_tile_of_negative_scores_keeps_its_maximum(language):
    queries, _, keys = scoring(1, 2, 16, 20, 50, mx.bfloat16)
    weights = mx.full((1, 20, 2), -1.0, mx.bfloat16)
    arrays = mx.abs(queries), weights, mx.abs(keys)
    scores = gpu.tile_scores(language, *arrays, 20, 0)
    expected = reference.tile_scores(*wide(*arrays), 20, 0)
    assert scores.max() < 0
    assert_near(scores, expected, SCORES)


def test_keys_of_a_slice_of_a_cache(language):
    queries, weights, keys = scoring(1, 2, 12, 16, 60, mx.bfloat16)
    part = gpu.tile_scores(language, queries, weights, keys[:, :, :33], 16, 20)
    whole = gpu.tile_scores(language, queries, weights, keys, 16, 20)
    assert mx.array_equal(part, whole[..., :33])


ROWS = {
    "random": lambda *shape: noise(*shape),
    "equal": lambda *shape: mx.zeros(shape),
    "relu": lambda *shape: mx.maximum(noise(*shape), 0),
    "tied": lambda *shape: mx.round(noise(*shape) * 2) / 2,
    "signed zeros": lambda *shape: mx.where(noise(*shape) > 0, 0.0, -0.0),
    "extreme": lambda *shape: noise(*shape) * 1e38,
    "tiny": lambda *shape: noise(*shape) * 1e-41,
}


@pytest.mark.parametrize("kind", ROWS)
def test_selection(language, kind):
    T, top_k = 2500, 100
    scores = ROWS[kind](2, 4, T)
    n_visible = mx.array([T, T - 1, 130, 70])
    slots = gpu.select_topk(language, scores, top_k, n_visible, 4, 16)
    expected = reference.select_topk(scores, top_k, n_visible, 4, 16)
    assert slots.dtype == mx.int32
    assert mx.array_equal(slots, expected)


@pytest.mark.parametrize("T, visible", [(1, 1), (99, 99), (100, 100), (101, 101), (33, 5)])
def test_selection_near_top_k(language, T, visible):
    scores = mx.round(noise(1, 1, T) * 2)
    arguments = scores, 100, mx.array([visible]), 4, 16
    expected = reference.select_topk(*arguments)
    assert mx.array_equal(gpu.select_topk(language, *arguments), expected)


@pytest.mark.parametrize("n_sink, n_recent", [(0, 1), (0, 64), (36, 64)])
def test_selection_of_forced_keys(language, n_sink, n_recent):
    scores = -mx.abs(noise(1, 2, 700))
    arguments = scores, 100, mx.array([700, 650]), n_sink, n_recent
    expected = reference.select_topk(*arguments)
    assert mx.array_equal(gpu.select_topk(language, *arguments), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gathered_rows(language, dtype):
    keys, values = noise(2, 3, 50, 16, dtype=dtype), noise(2, 3, 50, 16, dtype=dtype)
    slots = mx.random.randint(0, 40, (2, 5, 7))
    arguments = keys[:, :, :40], values[:, :, :40], slots
    for got, expected in zip(gpu.gather_tiles(language, *arguments), reference.gather_tiles(*arguments)):
        assert mx.array_equal(got, expected)


def tiles(B, Hq, Hkv, D, tile, n_tiles, T, K, dtype):
    L = tile * n_tiles
    queries = noise(B, Hq, L, D, dtype=dtype)
    keys, values = noise(B, Hkv, T, D, dtype=dtype), noise(B, Hkv, T, D, dtype=dtype)
    order = mx.argsort(mx.random.uniform(shape=(B, n_tiles, T - L)), axis=-1)
    return queries, keys, values, mx.sort(order[..., :K].astype(mx.int32), axis=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "B, Hq, Hkv, D, tile, n_tiles, T, K",
    [
        (1, 8, 2, 64, 64, 2, 300, 150),
        (2, 4, 1, 64, 16, 2, 100, 30),
        (1, 4, 2, 128, 17, 1, 90, 64),
        (1, 3, 3, 64, 10, 4, 57, 5),
        (1, 2, 2, 80, 8, 2, 40, 20),
    ],
)
def test_tile_attention(language, dtype, B, Hq, Hkv, D, tile, n_tiles, T, K):
    arrays = tiles(B, Hq, Hkv, D, tile, n_tiles, T, K, dtype)
    output = ops.tile_attention(*arrays, D**-0.5, language)
    assert output.dtype == dtype
    expected = reference.tile_attention(*wide(*arrays[:3]), arrays[3], D**-0.5)
    assert_near(output, expected, dtype)


def test_attention_of_large_scores(language):
    if not gpu.attends(language, mx.zeros((1, 2, 32, 64), mx.bfloat16)):
        pytest.skip("attention itself is MLX's own there")
    queries, keys, values, slots = tiles(1, 2, 1, 64, 16, 2, 150, 100, mx.bfloat16)
    arrays = queries * 30, keys * 30, values, slots
    output = ops.tile_attention(*arrays, 1.0, language)
    expected = reference.tile_attention(*wide(*arrays[:3]), slots, 1.0)
    assert_near(output, expected, mx.bfloat16)


# The choice of a backend.


@pytest.fixture
def no_verdicts(monkeypatch):
    monkeypatch.setattr(backends, "_verdicts", {})
    monkeypatch.setattr(backends, "device_language", lambda: "cuda")
    monkeypatch.setattr(backends, "_PROVEN", {"cuda": ("an operation",), "metal": ()})


def pick(backend, result=1.0, expected=1.0, gap=None):
    return backends.choose(
        backend,
        "an operation",
        lambda language: gap,
        lambda language: (mx.array(result), mx.array(expected)),
        "key",
    )


def test_auto_takes_a_kernel_that_is_right(no_verdicts, recwarn):
    assert pick("auto") == "cuda"
    assert pick("auto", result=9.0) == "cuda"  # tried once
    assert pick("reference") is None
    assert not recwarn


@pytest.mark.parametrize("result, expected", [(1.5, 1.0), (float("nan"), 1.0), (3, 4), (1.0, 0.0)])
def test_auto_leaves_a_kernel_that_is_wrong_and_says_so(no_verdicts, result, expected):
    with pytest.warns(UserWarning, match="an operation differs"):
        assert pick("auto", result, expected) is None
    assert pick("auto") is None  # and says so once


@pytest.mark.parametrize("cuda", [(), ("another",)])
def test_auto_leaves_an_operation_that_no_device_has_proven(no_verdicts, monkeypatch, cuda):
    proven = {"cuda": cuda, "metal": ("an operation",)}
    monkeypatch.setattr(backends, "_PROVEN", proven)
    assert pick("auto") is None
    assert pick("cuda") == "cuda"  # as asked


@pytest.mark.parametrize("language, keys", [(None, 64), ("cuda", 512), ("metal", 256)])
def test_a_gpu_is_dense_for_longer(monkeypatch, language, keys):
    monkeypatch.setattr(backends, "device_language", lambda: language)
    assert backends.crossover(64) == keys


def test_auto_leaves_a_kernel_that_does_not_run(no_verdicts):
    def trial(language):
        raise RuntimeError("no such instruction\nand more")

    with pytest.warns(UserWarning, match=r"does not run here \(no such instruction\)"):
        assert backends.choose("auto", "an operation", lambda _: None, trial) is None


def test_what_a_kernel_can_not_do(no_verdicts):
    assert pick("auto", gap="too wide") is None
    with pytest.raises(ValueError, match="too wide"):
        pick("cuda", gap="too wide")


def test_a_language_of_another_device_is_refused(no_verdicts):
    assert pick("cuda", result=9.0) == "cuda"  # as asked: no trial
    with pytest.raises(ValueError, match="'metal' needs"):
        pick("metal")
    with pytest.raises(ValueError, match="one of auto"):
        pick("vulkan")


def test_there_are_no_kernels_for_a_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert backends.device_language() is None
        assert ops.backends.choose("auto", "op", None, None) is None
    finally:
        mx.set_default_device(device)


OPERATIONS = ("tile_scores", "index_scores", "select_topk", "gather")


# Without the kernel that attends, rows are gathered by the other.
@pytest.mark.parametrize("attention", [(), ("tile_attention",)])
def test_trials_pass_and_their_kernels_are_used(language, attention, monkeypatch, recwarn):
    """The public functions, through "auto", with a first use of each kernel."""
    monkeypatch.setattr(backends, "_verdicts", {})
    monkeypatch.setattr(backends, "_PROVEN", {language: OPERATIONS + attention})
    used = []
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *a, **k: used.append(a[0]) or launch(*a, **k))
    arrays = scoring(1, 2, 12, 16, 300, mx.bfloat16)
    scores = ops.tile_scores(*arrays, 16, 250)
    ops.index_scores(*arrays)
    ops.select_topk(scores, 30, mx.array([300]), 1, 4)
    ops.tile_attention(*tiles(1, 2, 1, 64, 16, 1, 60, 20, mx.bfloat16), 0.1)
    attends = attention and language == "cuda"
    # Each twice: the trial and the call. Tiles have their queries' levels scored first.
    assert used == 6 * ["score"] + 2 * ["select"] + 2 * ["attend" if attends else "gather"]
    assert not recwarn
    assert all(backends._verdicts.values()) and len(backends._verdicts) == 4


def test_a_model_prefills_through_kernels(language, monkeypatch):
    """Whole prompts, chunks that cut tiles, a second turn: as with the reference."""
    dtype = mx.float32 if language == "metal" else mx.bfloat16
    model = make_model(dtype=dtype, head_dim=64, layers=1)
    indexers = make_indexers(model)
    tokens = make_tokens(150)
    rules = dict(top_k=60, tile_size=16, n_sink=2, n_recent=8, prefill="tile")
    results = {}
    for backend in ("reference", language):
        with patch_sparse_generate(model, indexers, backend=backend, **rules):
            _, results[backend] = feed(model, tokens, 90)
    # A changed selection changes a few logits of a random model: most must agree.
    gap = mx.abs(results["reference"] - results[language]).max(axis=-1)
    limit = 1e-3 if dtype == mx.float32 else 0.1
    assert (gap < limit).mean() > (0.999 if dtype == mx.float32 else 0.8)


@pytest.mark.parametrize("prefill, chunk", [("auto", 90), ("auto", 150), ("tile", 90)])
def test_auto_is_dense_up_to_the_crossover(monkeypatch, prefill, chunk):
    """By the place of a query alone: chunks do not change the result."""
    monkeypatch.setattr(crossovers, "crossover", lambda top_k: 2 * top_k)
    model = make_model(layers=1)
    tokens = make_tokens(150)
    _, dense = feed(model, tokens, 150)
    rules = dict(top_k=40, tile_size=16, n_sink=2, n_recent=8, prefill=prefill)
    with patch_sparse_generate(model, make_indexers(model), **rules):
        _, sparse = feed(model, tokens, chunk)
    same = mx.abs(sparse - dense).max(axis=(0, 2)) < 1e-4
    n_dense = 80 if prefill == "auto" else 32  # whole tiles within 40
    assert same[:n_dense].all()
    assert same[n_dense:].mean() < 0.5
