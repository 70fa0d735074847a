"""SnapKV's rule: the keys that the model's own last queries attend to stay."""

import mlx.core as mx
import numpy as np
import pytest
from builders import make_indexers
from evals_subject import make_subject
from family_models import family_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import SparseConfig
from mlx_dsa.evals import make_policy
from mlx_dsa.evals.generation import read
from mlx_dsa.evals.reading import DenseReading
from mlx_dsa.families import family_of

BUDGET, SINK, RECENT, WINDOW, RADIUS = 48, 4, 8, 12, 4
CONFIG = SparseConfig(top_k=BUDGET, n_sink=SINK, n_recent=RECENT, observation_window=WINDOW)


def expected_positions(model, ids):
    """Return, by layer, the positions that stay, from the attention of the dense model."""
    heard = {}
    layers = family_of(model).layers(model)
    projections = {i: layer.project for i, layer in layers.items()}
    x = model.model.embed_tokens(ids)
    for i, block in enumerate(model.layers):
        heard[i] = projections[i](block.input_layernorm(x), 0)
        x = block(x, "causal")
    kept = {}
    for i, projected in heard.items():
        q, k = (np.array(a[0], dtype=np.float64) for a in projected[:2])
        T = q.shape[1]
        k = np.repeat(k, q.shape[0] // k.shape[0], axis=0)
        logits = np.einsum("hqd,hkd->hqk", q[:, -WINDOW:], k) * layers[i].scale
        rows = np.arange(T - WINDOW, T)
        logits = np.where(np.arange(T) <= rows[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        seen = (np.arange(T) <= rows[:, None]).sum(axis=0)
        mean = weights.sum(axis=(0, 1)) / seen / q.shape[0]
        pooled = np.array([mean[max(0, t - RADIUS) : t + RADIUS + 1].max() for t in range(T)])
        always = [*range(SINK), *range(T - RECENT, T)]
        pooled[always] = np.inf
        kept[i] = sorted(np.argsort(-pooled, kind="stable")[:BUDGET].tolist())
    return kept


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_prompt_is_pruned_to_what_its_last_queries_attend_to(family):
    model = family_model(family)
    subject = make_subject()._replace(model=model, indexers=make_indexers(model))
    ids = mx.random.randint(0, 101, (1, 150), key=mx.random.key(3))
    expected = expected_positions(model, ids)
    found = {}
    for name in ("snapkv", "index"):
        policy = make_policy({"policy": name, "prefill": "dense"}, CONFIG)
        with policy.apply(subject):
            caches = make_prompt_cache(model)
            read(model, ids, caches)
            found[name] = {i: sorted(cache.positions[0].tolist()) for i, cache in enumerate(caches)}
    overlap = [len(set(found["snapkv"][i]) & set(expected[i])) for i in expected]
    # Of equal scores either may stay: pooling makes many.
    assert min(overlap) >= BUDGET - 2 * RADIUS
    assert found["index"] != found["snapkv"]
    forced = SINK + RECENT
    by_index = [len(set(found["index"][i]) & set(expected[i])) - forced for i in expected]
    assert max(by_index) < min(overlap) - forced


def test_a_dense_reading_serves_it_too():
    model = family_model("qwen2")
    subject = make_subject()._replace(model=model, indexers=make_indexers(model))
    ids = mx.random.randint(0, 101, (2, 90), key=mx.random.key(4))
    reading = DenseReading(model, ids[:, :-1])
    policy = make_policy("snapkv", CONFIG)
    positions = []
    for taken in (False, True):
        with policy.apply(subject) as patch:
            caches = reading.caches(model, patch) if taken else make_prompt_cache(model)
            read(model, ids[:, -1 if taken else 0 :], caches)
            positions.append([cache.positions.tolist() for cache in caches])
            for token in range(20):  # it goes on: the oldest of what is not recent are worth least
                model(mx.full((2, 1), token), cache=caches)
            assert all(cache.size() == BUDGET for cache in caches)
            assert all(cache.positions.max().item() == 109 for cache in caches)
    assert positions[0] == positions[1]


@pytest.mark.parametrize("n_recent", [1, 3, 4])
def test_steps_evict_in_the_same_order_with_few_recent_entries(n_recent):
    """From 4 on evictions are planned; below each step finds its own."""
    model = family_model("qwen2")
    subject = make_subject()._replace(model=model, indexers=make_indexers(model))
    config = SparseConfig(top_k=BUDGET, n_sink=SINK, n_recent=n_recent, observation_window=WINDOW)
    ids = mx.random.randint(0, 101, (1, 120), key=mx.random.key(5))
    with make_policy("snapkv", config).apply(subject):
        caches = make_prompt_cache(model)
        read(model, ids, caches)
        before = [set(cache.positions[0].tolist()) for cache in caches]
        for token in range(12):
            model(mx.full((1, 1), token), cache=caches)
        for cache, kept in zip(caches, before):
            after = set(cache.positions[0].tolist())
            assert len(after) == BUDGET and set(range(120, 132)) <= after
            # What came in the prompt goes first, but for its sinks.
            assert len(kept - after) == 12 and set(range(SINK)) <= after


def test_it_needs_a_budget_and_a_dense_reading():
    with pytest.raises(ValueError, match="is an order of eviction"):
        make_policy({"policy": "snapkv", "cache": "full"}, CONFIG)
    with pytest.raises(ValueError, match="is prefill 'dense' by itself"):
        make_policy({"policy": "snapkv", "prefill": "exact"}, CONFIG)
