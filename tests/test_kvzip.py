"""KVzip: a second reading says which entries stay."""

import mlx.core as mx
import numpy as np
import pytest
from builders import SHAPES, SMALL_RULES, make_model, make_tokens
from evals_subject import make_subject
from family_models import family_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import patch_sparse_generate
from mlx_dsa.evals import make_policies, make_policy, needle
from mlx_dsa.rules import KVzip
from mlx_dsa.rules.kvzip import read_again
from numpy_reference import ReferenceModel
from numpy_reference.forgetting import Forgetting, Window
from numpy_reference.weights import softmax

LENGTH, CHUNK = 50, 20
ASKS = [3, 1, 4], [1, 5, 9, 2], [6, 5]
SETTINGS = dict(SMALL_RULES, select="window", evict="window", prefill="dense")


def by_definition(model, ids, sinks=4, overlap=8):
    """Return the scores of each layer `[T]`, from dense readings in float64."""
    reference, first, later, before = ReferenceModel(model, {}), *ASKS
    scores = [[] for _ in reference.layers]
    for start in range(0, len(ids), CHUNK):
        stop = min(start + CHUNK, len(ids))
        ask = later + ids[max(0, start - overlap) : start] if start else first
        run = Forgetting(reference, Window(), top_k=10**6, n_sink=0, n_recent=1)
        run.feed(ids + ask + before + ids[start:stop])
        for cache, found in zip(run.caches, scores):
            n_sinks, T = min(sinks, start), len(cache.positions)
            those = [*range(n_sinks), *range(start, stop), *range(len(ids), T)]
            keys, queries = cache.rotated[those], cache.layer.rope(cache.queries, cache.positions)
            queries = queries[len(ids) :]
            keys = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
            logits = np.einsum("lhd,thd->hlt", queries, keys) / np.sqrt(keys.shape[-1])
            seen = np.array(those) <= np.arange(len(ids), T)[:, None]
            paid = softmax(np.where(seen, logits, -np.inf)).max((0, 1))
            found += paid[n_sinks : n_sinks + stop - start].tolist()
    return np.array(scores)


def read(model, ids, caches):
    for start in range(0, ids.shape[1], 32):
        model(ids[:, start : start + 32], cache=caches)


@pytest.fixture
def patched():
    """A patched model with caches that hold a text of two rows."""
    model, ids = make_model(**SHAPES["gqa2"]), make_tokens(LENGTH, batch=2)
    with patch_sparse_generate(model, None, evict_rule=KVzip(), **SETTINGS) as patch:
        caches = make_prompt_cache(model)
        read(model, ids, caches)
        yield model, ids, patch, caches


def test_scores_are_the_largest_attention_of_a_second_reading(patched):
    model, ids, patch, caches = patched
    before = [(np.array(c.keys), np.array(c.values), c.offset) for c in caches]
    read_again(model, patch.layers, caches, ids, ASKS, chunk=CHUNK)
    for cache, (keys, values, offset) in zip(caches, before):  # the reading leaves nothing else
        assert np.array_equal(cache.keys, keys) and np.array_equal(cache.values, values)
        assert cache.offset == offset and cache.observed is None
    found = [np.array(c.worth) for c in caches]
    patch.restore()
    for row, tokens in enumerate(ids.tolist()):
        expected = by_definition(model, tokens)
        for layer, scores in enumerate(expected):
            assert np.abs(found[layer][row] - scores).max() < 1e-5
        # It sees other sinks, and another overlap.
        for other in (by_definition(model, tokens, sinks=0), by_definition(model, tokens, overlap=0)):
            assert np.abs(found[1][row] - other[1]).max() > 1e-3


def test_what_it_says_decides_what_stays(patched):
    model, ids, patch, caches = patched
    read_again(model, patch.layers, caches, ids, ASKS, chunk=CHUNK)
    worth = [np.array(c.worth) for c in caches]
    patch.prune(caches)
    for cache, scores in zip(caches, worth):
        for row in range(2):
            free = sorted(range(3, LENGTH - 5), key=lambda i: (scores[row, i], i))[-16:]
            stays = {0, 1, 2, *range(LENGTH - 5, LENGTH), *free}
            assert set(cache.positions[row].tolist()) == stays
    newest = {0, 1, 2, *range(LENGTH - 21, LENGTH)}
    assert set(caches[0].positions[0].tolist()) != newest
    before = [set(c.positions[0].tolist()) for c in caches]
    for i in range(6):
        model(mx.full((2, 1), i), cache=caches)
    for cache, kept in zip(caches, before):  # what came after the text goes last
        assert set(range(LENGTH, LENGTH + 6)) <= set(cache.positions[0].tolist())
        assert len(kept - set(cache.positions[0].tolist())) == 6


def test_layers_without_attention_are_not_changed():
    """Their states can't be taken back: each chunk is repeated on copies."""
    model, ids = family_model("qwen3_next"), make_tokens(40)
    answers = []
    for again in (False, True):
        with patch_sparse_generate(model, None, evict_rule=KVzip(), **{**SETTINGS, "top_k": 60}) as patch:
            caches = make_prompt_cache(model)
            read(model, ids, caches)
            if again:
                read_again(model, patch.layers, caches, ids, ASKS, chunk=CHUNK)
                assert all((caches[i].worth < 1).all() for i in patch.layers)
            answers.append(model(mx.array([[7]]), cache=caches))
    assert mx.array_equal(*answers)


def test_what_is_refused(patched):
    model, ids, patch, caches = patched
    with pytest.raises(ValueError, match="nothing else"):
        read_again(model, patch.layers, caches, ids[:, 1:], ASKS)
    patch.prune(caches)
    with pytest.raises(ValueError, match="nothing else"):
        read_again(model, patch.layers, caches, ids, ASKS)
    patch.restore()
    for changes, says in ((dict(evict_rule=None), "rule"), (dict(prefill="exact"), "dense")):
        settings = {**SETTINGS, "evict_rule": KVzip(), **changes}
        with patch_sparse_generate(model, None, **settings) as other:
            caches = make_prompt_cache(model)
            read(model, ids, caches)
            with pytest.raises(ValueError, match=says):
                read_again(model, other.layers, caches, ids, ASKS)


def test_an_evaluation_reads_again():
    subject = make_subject()
    grid = dict(lengths=[256], depths=[0.2, 0.6], limit=2, max_tokens=4)
    specs = ["dense", "kvzip", {"policy": "window", "select": "window", "prefill": "dense"}]
    policies = make_policies(specs, subject.config)
    result = needle(subject, policies, setting="before-question", **grid)
    rows = {r["policy"]: r for r in result["rows"] if r["depth"] is None}
    assert rows["kvzip@64"]["n"] == rows["dense"]["n"] == 4
    assert result["config"]["policies"][1]["scorer"] == "kvzip"
    with pytest.raises(ValueError, match="questions must come after"):
        needle(subject, policies, setting="in-prompt", **grid)


def test_other_evaluations_refuse_it():
    subject = make_subject()
    with pytest.raises(ValueError, match="reads a text twice"):
        with make_policy("kvzip", subject.config).apply(subject):
            pass
    with pytest.raises(ValueError, match="is prefill 'dense' by itself"):
        make_policy({"policy": "kvzip", "prefill": "exact"}, subject.config)
    with pytest.raises(ValueError, match="is an order of eviction"):
        make_policy({"policy": "kvzip", "cache": "full"}, subject.config)


def test_an_evaluation_scores_what_the_second_reading_looked_at(monkeypatch):
    """It is told the very text that the caches hold, and its template's end."""
    heard = []

    def listen(model, layers, caches, ids, asks):
        heard.append((caches[0].offset, ids.shape, asks))
        read_again(model, layers, caches, ids, asks)
        assert all((c.worth < 1).all() for c in caches)

    monkeypatch.setattr("mlx_dsa.rules.kvzip.read_again", listen)
    subject = make_subject()
    policies = make_policies(["kvzip"], subject.config)
    grid = dict(lengths=[256], depths=[0.5], limit=1, max_tokens=2, setting="before-question")
    needle(subject, policies, **grid)
    ((offset, shape, asks),) = heard
    assert shape == (1, offset) and all(asks)
