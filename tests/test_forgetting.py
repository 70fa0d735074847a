"""Rules of forgetting against their definitions in NumPy, entry for entry and step for step."""

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, VOCAB, make_indexers, make_model
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS, MARGIN, difference

from mlx_dsa import patch_sparse_generate
from numpy_reference import ReferenceModel
from numpy_reference.forgetting import (
    H2O,
    TOVA,
    Expected,
    Forgetting,
    KeyDiff,
    KNorm,
    LagKV,
    Merging,
    Random,
    SnapKV,
    Window,
)

PROMPT, STEPS = 60, 14
SIZES = dict(SMALL_RULES, n_recent=3)  # too few recent ones for a plan: each step asks
SETTINGS = dict(select="window", prefill="dense", observation_window=8)

# What a user writes -> its definition, and one that must not fit.
RULES = {
    "window": (Window(), KNorm()),
    "random": (Random(), Random(seed=1)),
    "random:seed=5": (Random(seed=5), Random()),
    "knorm": (KNorm(), KNorm(radius=1)),
    "knorm:pool=2": (KNorm(radius=2), KNorm()),
    "keydiff": (KeyDiff(), KeyDiff(radius=3)),
    "keydiff:pool=0": (KeyDiff(radius=0), KeyDiff()),
    "snapkv": (SnapKV(), SnapKV(window=4)),
    "snapkv:pool=1": (SnapKV(radius=1), SnapKV()),
    "tova": (TOVA(), SnapKV(window=1, radius=0)),
    "h2o": (H2O(), H2O(mean=True)),
    "h2o:mean=true": (H2O(mean=True), H2O()),
    "expected_attention:queries=30,future=16": (Expected(), Expected(covariance=False)),
    "expected_attention:queries=30,future=16,covariance=false": (
        Expected(covariance=False),
        Expected(covariance=False, future=400),
    ),
    "expected_attention:queries=12,future=16,norms=false": (
        Expected(queries=12, norms=False),
        Expected(queries=30, norms=False),
    ),
    "expected_attention:queries=30,future=16,epsilon=1,sinks=6": (
        Expected(epsilon=1.0, sinks=6),
        Expected(),
    ),
    "lagkv:lag=8": (LagKV(), LagKV(lag=9)),
    "lagkv:lag=5,sinks=2": (LagKV(lag=5, sinks=2), LagKV()),
    "ems:base=knorm,threshold=0.3": (Merging(), KNorm()),
    "ems:base=snapkv,threshold=-1,share=0.5": (
        Merging(SnapKV(), threshold=-1, share=0.5, weigh=lambda worth: worth),
        Merging(SnapKV(), threshold=-1, share=0.5),
    ),
    "ems:base=h2o,threshold=0.2": (
        Merging(H2O(), threshold=0.2, weigh=lambda worth: worth),
        Merging(H2O(), threshold=0.2, share=0.25, weigh=lambda worth: worth),
    ),
}


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"])
    return model, ReferenceModel(model, {})


def texts():
    """Yield texts in which no token comes twice: equal keys are told apart by rounding alone."""
    for seed in range(100):
        yield mx.random.permutation(VOCAB, key=mx.random.key(seed))[: PROMPT + STEPS][None]


def by_definition(reference, order, ids):
    """Return the logits after the prompt's end and each step, what stayed then, and the margin."""
    run = Forgetting(reference, order, **SIZES)
    logits, kept, ids = [], [], ids[0].tolist()
    for start, stop in spans():
        logits.append(run.feed(ids[start:stop]))
        kept.append([set(c.positions.tolist()) for c in run.caches])
    return logits, kept, min(run.margins)


def spans():
    return [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]


def by_program(model, rule, ids, chunk=PROMPT, indexers=None, **changes):
    """Return the same of the program, whose prompt comes in calls of `chunk`."""
    logits, kept = [], []
    settings = {**SIZES, **SETTINGS, "evict": rule, **changes}
    with patch_sparse_generate(model, indexers, **settings) as patch:
        caches = make_prompt_cache(model)
        for start, stop in spans():
            if start == 0:
                with patch.reading(caches):
                    out = feed_parts(model, ids[:, :stop], chunk, caches)
            else:
                out = model(ids[:, start:stop], cache=caches)
            logits.append(np.array(out[0, -1].astype(mx.float32), dtype=np.float64))
            kept.append([set(c.positions[0].tolist()) for c in caches])
    return logits, kept


def feed_parts(model, ids, chunk, caches):
    for start in range(0, ids.shape[1], chunk):
        out = model(ids[:, start : start + chunk], cache=caches)
    return out


def clear_run(reference, order):
    """Return the first text whose decisions are all clear, and what comes of it."""
    for ids in texts():
        *run, margin = by_definition(reference, order, ids)
        if margin > MARGIN:
            return ids, *run
    raise AssertionError("no text with clear decisions: make the test smaller")


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_definition(small, rule):
    model, reference = small
    order, other = RULES[rule]
    ids, expected, stays = clear_run(reference, order)
    logits, kept = by_program(model, rule, ids)
    assert kept == stays
    assert difference(logits, expected) < LOGITS
    # The comparison sees another definition.
    wrong, gone, _ = by_definition(reference, other, ids)
    assert gone != kept or difference(logits, wrong) > 100 * LOGITS


@pytest.mark.parametrize("rule", RULES)
def test_cuts_of_a_prompt_change_nothing(small, rule):
    model, reference = small
    ids, _, _ = clear_run(reference, RULES[rule][0])
    whole = by_program(model, rule, ids)
    for chunk in (7, 32):
        parts = by_program(model, rule, ids, chunk)
        assert parts[1] == whole[1]
        assert difference(parts[0], whole[0]) < LOGITS


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_that_holds_the_text_is_dense(small, rule):
    model, _ = small
    ids = next(texts())
    caches = make_prompt_cache(model)
    dense = [model(ids[:, a:b], cache=caches)[0, -1] for a, b in spans()]
    logits, kept = by_program(model, rule, ids, top_k=PROMPT + STEPS)
    assert all(mx.array_equal(mx.array(a, mx.float32), b) for a, b in zip(logits, dense))
    assert kept[-1] == [set(range(PROMPT + STEPS))] * 2
    few, _ = by_program(model, rule, ids)
    assert difference(few, logits) > 100 * LOGITS


@pytest.mark.parametrize("rule", ["h2o", "expected_attention:queries=30,future=16"])
@pytest.mark.parametrize("shape", ["mha", "mqa", "yarn"])
def test_other_heads_and_a_rotation_that_stretches(rule, shape):
    model = make_model(**SHAPES[shape])
    reference = ReferenceModel(model, {})
    ids, expected, stays = clear_run(reference, RULES[rule][0])
    logits, kept = by_program(model, rule, ids)
    assert kept == stays
    assert difference(logits, expected) < LOGITS


@pytest.mark.parametrize("rule", ["h2o", "expected_attention:queries=12,future=16", "ems:base=snapkv"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_stream_is_one_wherever_its_calls_end(small, rule, positions):
    model, _ = small
    changes = dict(prefill="stream", stream_chunk=16, positions=positions)
    ids = next(texts())
    whole = by_program(model, rule, ids, **changes)
    for chunk in (5, 32):
        logits, kept = by_program(model, rule, ids, chunk, **changes)
        assert kept == whole[1]
        assert difference(logits, whole[0]) < LOGITS
    assert difference(by_program(model, rule, ids)[0], whole[0]) > 100 * LOGITS


@pytest.mark.parametrize("rule", ["h2o", "expected_attention", "lagkv:lag=8", "ems:base=knorm"])
def test_rows_of_a_batch_keep_their_own(small, rule):
    model, _ = small
    rows = [ids for ids, _ in zip(texts(), range(2))]
    with patch_sparse_generate(model, None, evict=rule, **SIZES, **SETTINGS) as patch:
        caches = make_prompt_cache(model)
        with patch.reading(caches):
            feed_parts(model, mx.concatenate(rows)[:, :PROMPT], 32, caches)
        for i in range(PROMPT, PROMPT + STEPS):
            out = model(mx.concatenate(rows)[:, i : i + 1], cache=caches)
        both = [[set(c.positions[row].tolist()) for c in caches] for row in (0, 1)]
    for row, ids in enumerate(rows):
        logits, kept = by_program(model, rule, ids, 32)
        assert kept[-1] == both[row]
        assert np.abs(np.array(out[row, -1]) - logits[-1]).max() < LOGITS
    assert both[0] != both[1]


def test_h2o_counts_what_steps_of_decode_pay(small):
    model, reference = small
    ids, _, _ = clear_run(reference, H2O())
    with patch_sparse_generate(model, None, evict="h2o", **SIZES, **SETTINGS) as patch:
        caches = make_prompt_cache(model)
        with patch.reading(caches):
            model(ids[:, :PROMPT], cache=caches)
        for i in range(PROMPT, PROMPT + STEPS):
            model(ids[:, i : i + 1], cache=caches)
        worth = [dict(zip(c.positions[0].tolist(), c.worth[0].tolist())) for c in caches]
    runs = [Forgetting(reference, H2O(in_decode=counts), **SIZES) for counts in (True, False)]
    for run in runs:
        for start, stop in spans():
            run.feed(ids[0, start:stop].tolist())
    for ours, right, wrong in zip(worth, runs[0].caches, runs[1].caches):
        assert np.allclose([ours[p] for p in right.positions], right.scores, atol=1e-4)
        assert sorted(right.positions) == sorted(wrong.positions)
        assert not np.allclose([ours[p] for p in wrong.positions], wrong.scores, atol=1e-2)


def test_h2o_goes_on_in_a_later_turn(small):
    """What an entry has been paid in the first turn counts in the second."""
    model, _ = small
    ids = next(texts())
    with patch_sparse_generate(model, None, evict="h2o", **SIZES, **SETTINGS) as patch:
        caches = make_prompt_cache(model)
        with patch.reading(caches):
            model(ids[:, :PROMPT], cache=caches)
        before = np.array(caches[0].worth[0])
        at = caches[0].positions[0].tolist()
        with patch.reading(caches):
            model(ids[:, PROMPT:], cache=caches)
            after, total = np.array(caches[0].worth[0]), np.array(caches[0].worth).sum()
        assert (after[: len(at)] > before).all()
        # Each query pays 1 in all.
        assert abs(total - before.sum() - STEPS) < 1e-3


def test_h2o_counts_steps_before_the_budget_is_full(small):
    model, _ = small
    ids = next(texts())
    with patch_sparse_generate(model, None, evict="h2o", **SIZES, **SETTINGS):
        caches = make_prompt_cache(model)
        model(ids[:, :10], cache=caches)
        for i in range(10, 40):
            model(ids[:, i : i + 1], cache=caches)
            if i < 24:
                assert abs(caches[1].worth.sum().item() - i - 1) < 1e-4
        assert caches[1].worth.sum().item() < 39


@pytest.mark.filterwarnings("ignore:.*no retention head")
@pytest.mark.parametrize("head", [8, 0])
def test_merging_over_the_retention_head_and_where_there_is_none(small, head):
    model, _ = small
    ids = next(texts())
    indexers = make_indexers(model, retention_dim=head)
    changes = dict(indexers=indexers, select="lightning")
    merged, kept = by_program(model, "ems:threshold=0.2", ids, **changes)
    over = by_program(model, "retention" if head else "keydiff", ids, **changes)
    never, _ = by_program(model, "ems:threshold=2", ids, **changes)
    # Merging changes later layers' hidden states, so only the first layer's choice is the same.
    assert kept[0][0] == over[1][0][0]
    assert difference(never, over[0]) == 0
    assert difference(merged, over[0]) > 100 * LOGITS


@pytest.mark.parametrize(
    "rule, says",
    [
        ("ems:base=ems", "must be another rule"),
        ("ems:base=nothing", "must be one of"),
        ("ems:share=-1", "share"),
        ("lagkv:lag=1", "lag"),
        ("expected_attention:future=0", "future"),
        ("expected_attention:queries=0", "queries"),
        ("h2o:pool=1", "has no option"),
    ],
)
def test_what_is_refused(small, rule, says):
    with pytest.raises(ValueError, match=says):
        patch_sparse_generate(small[0], None, evict=rule, **SIZES, **SETTINGS)


def test_merging_is_not_for_a_cold_store(small):
    model, _ = small
    changes = {**SETTINGS, "prefill": "stream", "select": "lightning"}
    with pytest.raises(ValueError, match="changes values"):
        patch_sparse_generate(model, make_indexers(model), cache="tiered", evict="ems:base=knorm", **SIZES, **changes)


def test_a_draw_is_another_in_each_layer(small):
    _, kept = by_program(small[0], "random", next(texts()))
    assert kept[0][0] != kept[0][1]
