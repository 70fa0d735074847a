"""Compact positions in every family: gates, partial and scaled RoPE, layers without attention."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from builders import SMALL_RULES, feed_calls
from family_models import FAMILIES, family_model
from mlx_lm.models.cache import make_prompt_cache
from test_families import ROUNDING, distinct, indexers_for

from mlx_dsa import load_cache, patch_sparse_generate, save_cache

RULES = dict(SMALL_RULES, prefill="stream", stream_chunk=16, positions="compact")


def hear(layer):
    """Keep the hidden states of which a layer makes keys, in the order of the text."""
    heard, project = [], layer.project

    def listening(x, offset=0, linear=None):
        heard.append(x)
        return project(x, offset, linear)

    layer.project = listening
    return heard, project


def keys_at(project, x, positions, numbers):
    """Return keys `[Hkv, n, D]` made of hidden states `[L, dim]`, each at a place of its own."""
    rows = [project(x[None, p : p + 1], n).keys[0] for p, n in zip(positions, numbers)]
    return mx.concatenate(rows, axis=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_those_of_their_numbers(name):
    model = family_model(name)
    tokens = mx.concatenate([distinct(90, 1, 2), distinct(40, 3, 4)], axis=1)
    with patch_sparse_generate(model, indexers_for(model), **RULES) as patch:
        heard = {i: hear(sparse.layer) for i, sparse in patch.layers.items()}
        cache = make_prompt_cache(model)
        feed_calls(model, tokens, [70, 1] + [1] * 13 + [30, 1] + [1] * 8, cache)
        for i, (states, project) in heard.items():
            x = mx.concatenate(states, axis=1)
            assert x.shape[1] == 123 == cache[i].offset and cache[i].shift > 80
            for row in (0, 1):
                positions = cache[i].positions[row].tolist()
                numbers = cache[i].numbers[row].tolist()
                assert max(numbers) < 24 + 5
                found = keys_at(project, x[row], positions, numbers)
                assert mx.allclose(cache[i].keys[row], found, atol=1e-4)
                stayed = keys_at(project, x[row], positions, positions)
                assert not mx.allclose(cache[i].keys[row], stayed, atol=1e-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_copies_and_files_give_one_answer(name, tmp_path):
    model = family_model(name)
    tokens = distinct(96, 1)
    answers = {}

    def go_on(cache):
        return np.array(mx.concatenate(feed_calls(model, tokens[:, 76:], [1] * 20, cache), axis=1))

    with patch_sparse_generate(model, indexers_for(model), **RULES) as patch:
        for step in (76, 20, 7):
            cache = make_prompt_cache(model)
            with patch.reading(cache):
                calls = [min(step, 76 - i) for i in range(0, 76, step)]
                logits = feed_calls(model, tokens, calls, cache)
            save_cache(tmp_path / "a.kv", cache, patch)
            others = copy.deepcopy(cache), load_cache(tmp_path / "a.kv", patch).caches
            rest = go_on(cache)
            assert all(np.abs(go_on(other) - rest).max() < ROUNDING for other in others)
            answers[step] = np.concatenate([np.array(mx.concatenate(logits, axis=1)), rest], axis=1)
    assert all(np.abs(answer - answers[76]).max() < ROUNDING for answer in answers.values())
    with patch_sparse_generate(model, indexers_for(model), **{**RULES, "positions": "absolute"}) as patch:
        cache = make_prompt_cache(model)
        with patch.reading(cache):
            feed_calls(model, tokens, [76], cache)
        assert np.abs(go_on(cache) - rest).max() > 10 * ROUNDING
