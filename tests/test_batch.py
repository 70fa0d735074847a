"""Rows of a batch answer as alone: with any rule, of any length, whenever they join and leave."""

import copy
import gc
import warnings

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, make_model, rules_alone
from calibrations import FOUND, calibrations_for
from family_models import FAMILIES, family_model
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from simulate import LOGITS
from test_cuts import RULES, WAYS, kept, make_text
from test_retention import with_heads

from mlx_dsa import patch_sparse_generate
from mlx_dsa.cache import RowsCache, stack
from mlx_dsa.dense import DenseAttention
from mlx_dsa.positions import PositionLimit
from mlx_dsa.registry import rule_names

LENGTHS = [60, 9, 31, 17, 100]
MORE_WAYS = {
    **WAYS,
    "stream": dict(cache="budget", prefill="stream", stream_chunk=16, positions="compact"),
    "snapkv-by-head": dict(cache="budget", evict="snapkv:by_head=true"),
    "h2o": dict(cache="budget", evict="h2o"),
    "blend": dict(cache="budget", evict="blend"),
    "few-recent": dict(cache="budget", n_recent=2),
}


@pytest.fixture(scope="module")
def small():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    return model, with_heads(model)


def prompts():
    return [make_text(n, seed=n)[0].tolist() for n in LENGTHS]


class Script:
    """Sample tokens that are in no prompt and come once: of two of one, either may be evicted,
    as rounding has it, which differs by the number of rows."""

    def __init__(self, prompt):
        unseen = np.setdiff1d(np.arange(1024), prompt)
        self.tokens = np.random.default_rng(len(prompt)).permutation(unseen).tolist()

    def __call__(self, logprobs):
        return mx.array([self.tokens.pop(0)])


def alone(model, prompt, n, cache=None, step=32, script=None):
    cache = make_prompt_cache(model) if cache is None else cache
    options = dict(max_tokens=n, prompt_cache=cache, prefill_step_size=step, sampler=Script(script or prompt))
    steps = generate_step(mx.array(prompt), model, **options)
    tokens, logprobs = zip(*((int(t), np.array(p)) for t, p in steps))
    return list(tokens), np.stack(logprobs), cache


def together(model, prompts, counts, later=None, step=32, caches=None):
    """Answer prompts in one batch; return by row the tokens, log-probabilities and caches.

    ``later``: prompts and counts by the step after which they join.
    """
    batch = BatchGenerator(model, prefill_step_size=step)
    results, later = {}, {0: list(zip(prompts, counts)), **(later or {})}
    n = 0
    while later or any(r[2] is None for r in results.values()):
        if n in later:
            texts, counts = zip(*later.pop(n))
            samplers = [Script(text) for text in texts]
            caches = caches and list(caches)
            uids = batch.insert(list(texts), list(counts), samplers=samplers, caches=caches)
            results |= {uid: ([], [], None) for uid in uids}
        n += 1
        for r in batch.next()[1]:
            tokens, logprobs, _ = results[r.uid]
            tokens.append(r.token)
            logprobs.append(np.array(r.logprobs))
            if r.finish_reason is not None:
                results[r.uid] = (tokens, logprobs, r.prompt_cache)
    batch.close()
    return [(tokens, np.stack(logprobs), cache) for tokens, logprobs, cache in results.values()]


def same_answer(one, other):
    return one[0] == other[0] and np.abs(one[1] - other[1]).max() < LOGITS


@pytest.mark.parametrize("way", MORE_WAYS)
@pytest.mark.parametrize("shape", ["gqa2", "moe"])
def test_rows_of_unequal_length_answer_as_alone(way, shape):
    model = make_model(**SHAPES[shape], vocab=1024)
    with patch_sparse_generate(model, with_heads(model), **{**RULES, **MORE_WAYS[way]}):
        rows = together(model, prompts(), [40, 12, 70, 33, 1])
        for prompt, row in zip(prompts(), rows):
            mine = alone(model, prompt, len(row[0]))
            assert same_answer(mine, row)
            # mlx-lm has read one token more alone than it has given.
            assert [c.offset for c in row[2]] == [c.offset - (len(row[0]) < 1) for c in mine[2]]


@pytest.mark.parametrize("way", ["retention", "compact", "keydiff", "stream", "full"])
def test_rows_join_and_leave_at_any_step(small, way):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, **MORE_WAYS[way]}):
        texts = prompts()
        later = {3: [(texts[2], 50)], 20: [(texts[3], 5), (texts[4], 60)], 33: [(texts[0], 20)]}
        rows = together(model, texts[:2], [45, 80], later)
        asked = texts[:2] + [texts[2], texts[3], texts[4], texts[0]]
        for prompt, row in zip(asked, rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


@pytest.mark.parametrize("way", MORE_WAYS)
def test_what_a_row_leaves_goes_on(small, way):
    """What a finished row's cache holds answers the next turn as a conversation alone does."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, **MORE_WAYS[way]}):
        rows = together(model, prompts(), [40, 12, 70, 33, 9])
        for i, (prompt, row) in enumerate(zip(prompts(), rows)):
            cache = alone(model, prompt, len(row[0]))[2]
            assert kept(cache) == kept(row[2])
            turn = make_text(37, seed=70 + i)[0].tolist()
            assert same_answer(alone(model, turn, 30, cache), alone(model, turn, 30, row[2]))
        turns = [make_text(20 + 9 * i, seed=80 + i)[0].tolist() for i in range(len(rows))]
        mine = [alone(model, t, 30, [c.copy() for c in row[2]]) for t, row in zip(turns, rows)]
        theirs = together(model, turns, [30] * len(rows), caches=[row[2] for row in rows])
        assert all(map(same_answer, mine, theirs))


@pytest.mark.parametrize("evict", rule_names("evict"))
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_any_rule_of_forgetting(small, evict, positions):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, "evict": evict, "positions": positions}):
        rows = together(model, prompts()[:3], [33, 60, 12], {5: [(prompts()[4], 40)]})
        for prompt, row in zip([*prompts()[:3], prompts()[4]], rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


SELECT = [n for n in rules_alone() if n != "sparsek"] + ["sparsek:window=6"]


@pytest.mark.parametrize("select", SELECT)
def test_any_rule_of_selecting(small, select):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, "select": select, "cache": "full"}):
        rows = together(model, prompts()[:3], [33, 60, 12], {5: [(prompts()[4], 40)]})
        for prompt, row in zip([*prompts()[:3], prompts()[4]], rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


@pytest.mark.parametrize("select", FOUND)
def test_any_rule_of_selecting_that_reads_a_calibration(small, select):
    model, _ = small
    rules = {**RULES, "cache": "full", "evict": "window", "prefill": "exact"}
    rules["select"] = {"minference": "minference:last_q=8,block=8"}.get(select, select)
    with patch_sparse_generate(model, calibrations_for(model, select), **rules):
        rows = together(model, prompts()[:3], [33, 60, 12], {5: [(prompts()[4], 40)]})
        for prompt, row in zip([*prompts()[:3], prompts()[4]], rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family(family):
    model = family_model(family, vocab_size=1024)
    with patch_sparse_generate(model, None, select="oracle", **{**RULES, "evict": "keydiff"}):
        rows = together(model, prompts()[:3], [33, 60, 12], {5: [(prompts()[4], 40)]})
        for prompt, row in zip([*prompts()[:3], prompts()[4]], rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


def test_budgets_are_one_array_in_decode(small, monkeypatch):
    """Or the tests above would say nothing of it."""
    model, indexers = small
    seen = []
    original = mx.fast.scaled_dot_product_attention

    def attention(queries, *arguments, **options):
        seen.append((queries.shape[0], queries.shape[2]))
        return original(queries, *arguments, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    with patch_sparse_generate(model, indexers, **RULES):
        together(model, prompts(), [40] * 5)
    assert seen.count((5, 1)) >= 2 * 36
    seen.clear()
    with patch_sparse_generate(model, indexers, **{**RULES, "evict": "index"}):
        together(model, prompts(), [40] * 5)
    assert (5, 1) not in seen


@pytest.mark.parametrize("evict", ["retention", "keydiff"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_rows_that_are_not_full_grow_together(small, monkeypatch, evict, positions):
    model, indexers = small
    monkeypatch.setattr(stack, "_STEP", 8)
    rules = {**RULES, "top_k": 64, "n_recent": 16, "evict": evict, "positions": positions}
    with patch_sparse_generate(model, indexers, **rules):
        texts = prompts()[:4] + [make_text(3, seed=5)[0].tolist()]
        rows = together(model, texts, [90, 100, 40, 120, 130], {7: [(prompts()[4], 30)], 70: [(texts[4], 9)]})
        for prompt, row in zip([*texts, prompts()[4], texts[4]], rows):
            assert same_answer(alone(model, prompt, len(row[0])), row)


def test_a_wrong_row_would_show(small):
    """The control: another row's numbers give another answer."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        rows = together(model, prompts(), [20] * 5)
        assert not same_answer(alone(model, prompts()[1], 20), rows[0])


def test_a_batch_that_is_split_shares_what_it_can(small):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        caches = [alone(model, prompt, 3)[2][0] for prompt in prompts()[:3]]
        batch = caches[0].merge(caches)
        other = copy.deepcopy(batch)
        batch.filter([0, 2])
        other.filter([1])
        assert batch.rows == [caches[0], caches[2]] and other.rows == [caches[1]]
        third = copy.deepcopy(batch)  # both go on: the one that goes on first copies
        (row, _), _ = third.parts(1)
        assert row is not caches[0] and batch.rows[0] is caches[0]


def test_padding_on_the_left_is_refused(small):
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        batch = RowsCache(make_prompt_cache(model)[:1])
        with pytest.raises(ValueError, match="right"):
            batch.prepare(left_padding=[1])


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("cache", ["budget", "full"])
def test_a_layer_left_dense_has_a_mask_of_its_own(small, monkeypatch, dense, cache):
    model, indexers = small
    later = {5: [(prompts()[4], 40)]}

    def differ():
        rows = together(model, prompts()[:3], [33, 60, 12], later)
        asked = [*prompts()[:3], prompts()[4]]
        return [not same_answer(alone(model, prompt, len(row[0])), row) for prompt, row in zip(asked, rows)]

    with patch_sparse_generate(model, indexers, **RULES, cache=cache, dense_layers=(dense,)) as patch:
        assert not any(differ())
        if dense:  # the first layer's cache makes the mask that mlx-lm gives to all
            monkeypatch.setattr(DenseAttention, "__call__", lambda self, x, mask, cache: self.attention(x, mask, cache))
            assert any(differ())
    assert not any(isinstance(m, DenseAttention) for m in model.modules()) and patch.keeps_all


# What can be taken back: a server asks the same prompt another question.


@pytest.mark.parametrize("evict", ["retention", "keydiff", "index", "window"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_tokens_since_a_streams_last_cut_can_be_taken_back(small, evict, positions):
    model, indexers = small
    rules = {**RULES, "prefill": "stream", "stream_chunk": 16, "evict": evict, "positions": positions}
    text, other = make_text(77, seed=1)[0].tolist(), make_text(40, seed=9)[0].tolist()
    with patch_sparse_generate(model, indexers, **rules) as patch:
        caches = make_prompt_cache(model)
        for start in range(0, 77, 30):
            mx.eval(model(mx.array([text[start : min(start + 30, 77)]]), cache=caches), [c.state for c in caches])
        assert [c.trimmable for c in caches] == [13, 13]  # since 64
        assert not any(c.is_trimmable() for c in caches)
        for n in (1, 6, 13):
            taken = [c.copy() for c in caches]
            assert [c.trimmable for c in taken] == [13, 13]
            assert [c.trim(n) for c in taken] == [n, n]
            mine = alone(model, text[: 77 - n] + other, 20, script=text + other)
            assert same_answer(mine, alone(model, other, 20, taken, script=text + other))
            back = [c.copy() for c in caches]  # the control: one token less
            assert [c.trim(n - 1) for c in back] == [n - 1, n - 1]
            assert not same_answer(mine, alone(model, other, 20, back, script=text + other))
        assert [c.trim(14) for c in caches] == [0, 0]  # what was cut is gone
        patch.prune(caches)
        assert [c.trimmable for c in caches] == [0, 0]


def test_a_row_that_outgrows_the_positions_is_told_at_that_token():
    model = make_model(**SHAPES["gqa2"], vocab=1024)
    indexers = with_heads(model)
    seen = []

    def answer(model, texts, counts):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            batch = BatchGenerator(model)
            batch.insert(texts, counts)
            while batch.next_generated():
                seen.append(sum("positions" in str(w.message) for w in told))
            batch.close()

    model.args.max_position_embeddings = 100
    with patch_sparse_generate(model, indexers, **{**RULES, "positions": "absolute"}):
        answer(model, [make_text(n, seed=n)[0].tolist() for n in (70, 20)], [60, 60])
    # Its 101st token is fed for the 31st after its prompt, one ahead of what is given.
    assert seen[-1] == 1 and abs(seen.index(1) - 31) <= 1


@pytest.mark.parametrize("evict", ["retention", "keydiff"])
def test_tokens_that_were_written_in_a_batch_can_be_taken_back(small, evict):
    """What its latest steps left to be made goes with them."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, "evict": evict, "top_k": 64, "n_recent": 16}):
        texts, turn = [make_text(n, seed=n)[0].tolist() for n in (20, 30)], make_text(70, seed=2)[0].tolist()
        for text, row in zip(texts, together(model, texts, [9, 9])):
            for n in (3, 20):
                mine, theirs = alone(model, text, 9)[2], [c.copy() for c in row[2]]
                assert all(c.trim(n) == n for c in [*mine, *theirs])
                assert same_answer(alone(model, turn, 30, mine), alone(model, turn, 30, theirs))


def test_a_turn_of_pieces_of_one_token_is_a_prompt(small):
    """A step of the answer before it would have evicted for it."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, "prefill": "exact"}):
        before = [alone(model, prompt, 30)[2] for prompt in prompts()[:2]]
        turns = [make_text(5, seed=n)[0].tolist() for n in (7, 8)]
        for n_rows in (1, 2):
            batch, rows = BatchGenerator(model), {}
            for caches, turn in zip(before[:n_rows], turns):
                pieces, own = [[turn[:1], turn[1:2], turn[2:]]], [[c.copy() for c in caches]]
                (uid,) = batch.insert_segments(pieces, [20], own, [[]], samplers=[Script(turn)])
                rows[uid] = ([], [], alone(model, turn, 20, [c.copy() for c in caches]))
            while any(len(tokens) < 20 for tokens, *_ in rows.values()):
                for r in batch.next()[1]:
                    rows[r.uid][0].append(r.token)
                    rows[r.uid][1].append(np.array(r.logprobs))
            for tokens, logprobs, mine in rows.values():
                assert same_answer(mine, (tokens, np.stack(logprobs)))


def test_a_copy_of_a_row_keeps_no_other_row_alive(small):
    """Nor their late states, whatever place a row has in the batch."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **{**RULES, "top_k": 512, "n_recent": 256}):
        batch = BatchGenerator(model)
        batch.insert([make_text(600, seed=n)[0].tolist() for n in range(6)], [400] * 6)
        while len(batch._generation_batch) < 6:
            batch.next()
        for _ in range(260):
            batch.next()
        rows = batch._generation_batch.prompt_cache[0]
        places = [place % rows._stack._n_slots for place in rows._stack._places]
        assert 0 in places  # of a view
        one = rows.extract(places.index(0))
        mx.eval(one.contents)
        batch.close()
        del batch, rows
        held = held_bytes()
        n_bytes, one = one.nbytes, None
        assert held - held_bytes() < 1.5 * n_bytes


def held_bytes():
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def test_positions_are_checked_at_every_step_of_a_batch(small, monkeypatch):
    """Rows are told of their steps seldom: a text that becomes too long must not be told late."""
    model, indexers = small
    checked = []
    monkeypatch.setattr(PositionLimit, "check", lambda self, cache, n: checked.append(cache.number + n))
    with patch_sparse_generate(model, indexers, **{**RULES, "top_k": 256, "n_recent": 64}):
        texts = [make_text(20, seed=n)[0].tolist() for n in (1, 2)]
        rows = together(model, texts, [40, 40])
    assert max(checked) == max(c.offset for row in rows for c in row[2]) or max(checked) == 20 + 40 + 1


def test_what_mlx_lm_has_let_go_is_no_reason_to_copy(small):
    """A copy has no companion: an index of a whole text would be built anew for each turn."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        caches = [alone(model, prompt, 3)[2][0] for prompt in prompts()[:2]]
        batches = [caches[0].merge(caches)]
        other = copy.deepcopy(batches[0])
        batches.clear()
        assert [row for row, _ in other.parts(1)] == caches


def test_a_batch_whose_state_nobody_reads_comes_to_decode(small):
    """It is not taken for a prompt for ever, in which nothing is evicted."""
    model, indexers = small
    with patch_sparse_generate(model, indexers, **RULES):
        caches = [make_prompt_cache(model) for _ in range(2)]
        batch = [row[0].merge(row) for row in zip(*caches)]
        text = mx.concatenate([make_text(60, seed=n) for n in (1, 2)])
        for start, stop in ((0, 30), (30, 45), *((i, i + 1) for i in range(45, 60))):
            mx.eval(model(text[:, start:stop], cache=batch))
        assert all(c.size() == RULES["top_k"] for c in batch)
