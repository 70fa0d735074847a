"""Selection by trained search projections, against sets written down in NumPy."""

import functools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from builders import EXACT, SHAPES, feed, layer_of, make_indexers, make_model, make_text, make_tokens
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS, difference, generate_calls, run_program, run_reference, whole_calls
from test_cuts import kept, same

from mlx_dsa import load_indexers, patch_sparse_generate, save_indexers
from mlx_dsa.rules import make_rule
from mlx_dsa.search import Projections, ProjectionsArgs, load_projections, save_projections
from numpy_reference import ReferenceModel, Rules
from numpy_reference.weights import linear

RULES = dict(EXACT, observation_window=8)
SELECT = dict(select="projections")


def make_projections(model, n=16, layers=None, seed=1):
    mx.random.seed(seed)
    args = ProjectionsArgs(model.args.hidden_size, n)
    return {i: Projections(args) for i in (range(len(model.layers)) if layers is None else layers)}


def in_numpy(projections, lengths=True):
    """Copy projections; without `lengths` they are compared by their product, no cosine."""
    wq, wk = linear(projections.wq), linear(projections.wk)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True) if lengths else x

    return SimpleNamespace(
        queries=lambda x, positions: (unit(wq(x)), np.ones(len(x))),
        keys=lambda x, positions: unit(wk(x)),
        scores=lambda q, w, k: q @ k.T,
        retention=None,
    )


def make_reference(model, projections, **how):
    reference = ReferenceModel(model, {})
    reference.indexers = {i: in_numpy(p, **how) for i, p in projections.items()}
    return reference


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, make_projections(model)


def test_scores_are_cosines(small):
    model, projections = small
    layer = layer_of(model, 1)
    rule = make_rule("select", "projections").bind(layer, projections[1].bind(layer))
    x = mx.random.normal((2, 9, 64))
    entry, probe = rule.step(x, 5)
    assert entry.shape == (2, 1, 9, 16) and rule.entry_width() == 16
    assert np.allclose(np.linalg.norm(np.array(entry), axis=-1), 1, atol=1e-6)
    scores = np.array(rule.scores(probe, SimpleNamespace(index_keys=entry), mx.arange(1, 8), 7))
    copy = in_numpy(projections[1])
    for row, own in zip(np.array(x, dtype=np.float64), scores):
        expected = copy.scores(*copy.queries(row, None), copy.keys(row, None))[:, :7]
        assert own.shape == (9, 7) and np.abs(own - expected).max() < 1e-6
        assert expected.min() < -0.1  # which a ReLU would hide


def test_keys_are_scored_in_blocks_alike(small, monkeypatch):
    from mlx_dsa.rules import projections as module

    model, projections = small
    layer = layer_of(model, 0)
    rule = make_rule("select", "projections").bind(layer, projections[0].bind(layer))
    entry, probe = rule.step(mx.random.normal((1, 50, 64)), 0)
    cache = SimpleNamespace(index_keys=entry)
    whole = rule.scores(probe, cache, None, 50)
    monkeypatch.setattr(module, "_BLOCK", 7 * 16)
    assert mx.allclose(rule.scores(probe, cache, None, 50), whole, atol=1e-6)


def test_nothing_of_length_zero_becomes_nan(small):
    keys = small[1][0].project_keys(mx.zeros((1, 2, 64)))
    assert not keys.any() and mx.isfinite(keys).all()


@pytest.mark.parametrize("cache", ["full", "budget", "tiered"])
@pytest.mark.parametrize("chunk", [1000, 16, 7])
def test_logits_and_entries_against_numpy(small, cache, chunk):
    model, projections = small
    reference = make_reference(model, projections)
    calls = generate_calls(60, chunk, 6)
    rules = {**RULES, "cache": "budget" if cache == "budget" else "full", "evict": "index"}
    tokens, _, logits, stays = run_reference(reference, rules, calls, make=make_text)
    own = {**rules, "cache": cache, **SELECT, **({"cold_bits": 16} if cache == "tiered" else {})}
    found, left = run_program(model, projections, own, tokens, calls)
    assert difference(found, logits) < LOGITS
    assert left == stays
    # By the product of vectors of any length it is other sets, and so other logits.
    by_product = make_reference(model, projections, lengths=False).start(Rules(**rules))
    start, others = 0, []
    for length in calls:
        others.append(by_product.feed(tokens[0, start : start + length].tolist()))
        start += length
    assert difference(found, others) > 100 * LOGITS


def test_a_tile_takes_the_largest_cosine_of_its_queries(small):
    model, projections = small
    reference = make_reference(model, projections)
    rules = dict(top_k=40, n_sink=3, n_recent=5, prefill="tile", tile_size=16, cache="full")
    calls = whole_calls(128, 32)
    found = {}
    for leveled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not leveled:
                patch.setattr(Rules, "levels", lambda self, scores: np.zeros(len(scores)))
            tokens, _, logits, _ = run_reference(reference, rules, calls, make=make_text)
        found[leveled], _ = run_program(model, projections, {**rules, **SELECT}, tokens, calls)
        assert (difference(found[leveled], logits) < LOGITS) != leveled


@pytest.mark.parametrize("cache", ["full", "budget", "tiered"])
def test_a_budget_for_all_gives_the_dense_bits(cache):
    model = make_model(**SHAPES["gqa2"])
    tokens = make_tokens(70)
    _, dense = feed(model, tokens, 64)
    projections = make_projections(model)
    for top_k, equal in ((70, True), (40, False)):
        how = {**RULES, "top_k": top_k, "cache": cache, "evict": "keydiff", **SELECT}
        with patch_sparse_generate(model, projections, **how):
            _, found = feed(model, tokens, 64)
        assert mx.array_equal(found, dense).item() == equal


WAYS = {
    "full": dict(cache="full"),
    "tiered": dict(cache="tiered", cold_bits=16),
    "budget": dict(cache="budget", evict="index"),
    "compact": dict(cache="budget", evict="keydiff", positions="compact"),
    "stream": dict(cache="budget", evict="index", prefill="stream", stream_chunk=16),
    "tile": dict(cache="full", prefill="tile", tile_size=16),
}


@pytest.fixture(scope="module")
def answer(small):
    model, projections = small

    @functools.cache
    def run(way, length, step):
        with patch_sparse_generate(model, projections, **{**RULES, **WAYS[way], **SELECT}):
            cache = make_prompt_cache(model)
            text = make_text(length, seed=7)[0]
            steps = generate_step(text, model, max_tokens=5, prompt_cache=cache, prefill_step_size=step)
            return np.stack([np.array(p) for _, p in steps]), kept(cache)

    return run


@pytest.mark.parametrize("way", WAYS)
def test_every_cut_gives_one_answer(answer, way):
    for step in (16, 32, 48) if way == "tile" else (1, 2, 5, 16, 31, 33, 98):
        assert same(answer(way, 100, step), answer(way, 100, 2048)), step
    assert not same(answer(way, 100, 16), answer(way, 99, 16))


def test_a_layer_without_projections_stays_dense(small):
    model, _ = small
    with patch_sparse_generate(model, make_projections(model, layers=[1]), **RULES, **SELECT, cache="full"):
        cache, _ = feed(model, make_tokens(40), 16)
    assert not hasattr(cache[0], "index_keys") and cache[1].index_keys.shape == (1, 1, 40, 16)


def test_a_head_that_is_not_there_is_told(small):
    model, projections = small
    with pytest.warns(UserWarning, match="no retention head"):
        with patch_sparse_generate(model, projections, **RULES, **SELECT, evict="retention") as patch:
            assert type(patch.layers[0].eviction.rule).__name__ == "KeyDiff"


@pytest.mark.filterwarnings("ignore:.*no retention head")
def test_each_rule_says_which_trained_files_it_reads(small, tmp_path):
    model, projections = small
    with pytest.raises(ValueError, match="are for select='projections', but 'select' is 'lightning'"):
        patch_sparse_generate(model, projections, **RULES)
    with pytest.raises(ValueError, match="are for select='lightning', but 'select' is 'projections'"):
        patch_sparse_generate(model, make_indexers(model), **RULES, **SELECT)
    save_projections(tmp_path / "p", projections)
    save_indexers(tmp_path / "i", make_indexers(model))
    with pytest.raises(ValueError, match="holds search projections, not .* Use select='projections'"):
        load_indexers(tmp_path / "p")
    with pytest.raises(ValueError, match="holds lightning indexers, not .* Use select='lightning'"):
        load_projections(tmp_path / "i")
    with pytest.raises(ValueError, match="hidden_size = 64 but got 32. .* for another model"):
        patch_sparse_generate(model, {0: Projections(ProjectionsArgs(32, 8))}, **RULES, **SELECT)
    # A refused model is as it was.
    with patch_sparse_generate(model, projections, **RULES, **SELECT, evict="window"):
        pass


def test_what_is_saved_is_loaded(small, tmp_path):
    model, projections = small
    file = save_projections(tmp_path / "a" / "b", projections, {"note": 1})
    assert file.name == "indexers.safetensors"
    for loaded in (load_projections(file), load_projections(file.parent)):
        assert list(loaded) == [0, 1]
        for i, one in loaded.items():
            assert one.args == projections[i].args
            assert mx.array_equal(one.wq.weight, projections[i].wq.weight)
            assert mx.array_equal(one.wk.weight, projections[i].wk.weight)
            assert not mx.array_equal(one.wq.weight, one.wk.weight)


def test_what_does_not_fit_is_refused(small, tmp_path):
    projections = {**small[1], 5: Projections(ProjectionsArgs(64, 8))}
    with pytest.raises(ValueError, match="of one shape but got 2"):
        save_projections(tmp_path, projections)
    header = {"kind": "projections"}
    for arrays, told in (
        ({"layers.0.wq.weight": mx.ones((4, 8))}, "one for keys, of one shape, but has wq.weight"),
        ({"layers.0.wq.weight": mx.ones((4, 8)), "layers.0.wk.weight": mx.ones((5, 8))}, "of one shape"),
        ({"layers.0.wv.weight": mx.ones((4, 8))}, "'layers.0.wv.weight'.* no matrix of projections"),
    ):
        mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays, header)
        with pytest.raises(ValueError, match=told):
            load_projections(tmp_path / "x.safetensors")
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {}, {"kind": "other"})
    with pytest.raises(ValueError, match="holds 'other', which this version does not know"):
        load_projections(tmp_path / "x.safetensors")
