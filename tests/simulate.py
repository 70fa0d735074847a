"""Drive the program and the NumPy reference through the same calls."""

import mlx.core as mx
import numpy as np
from builders import EXACT, SHAPES, feed_calls, make_indexers, make_model, make_tokens
from mlx_lm.models import cache as lm_cache

from mlx_dsa import patch_sparse_generate
from numpy_reference import ReferenceModel, Rules

# A selection is only comparable where float32 cannot decide otherwise: the last
# score in and the first one out must differ by more than float32 rounding.
MARGIN = 1e-5

# Largest difference of a logit (they are of order 1 to 8) to float64.
LOGITS = 5e-5

# A budget that short prompts exceed.
RULES = dict(EXACT, observation_window=8, evict="index")


def make_small():
    """Return a model, its indexers, and both in NumPy."""
    model = make_model(**SHAPES["gqa2"])
    indexers = make_indexers(model)
    return model, indexers, ReferenceModel(model, indexers)


def whole_calls(length, chunk):
    """Split `length` tokens into calls of `chunk` and a rest."""
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def generate_calls(length, chunk, steps):
    """Split a prompt as `mlx_lm.generate_step` does, then take `steps` steps."""
    return whole_calls(length - 1, chunk) + [1] * (1 + steps)


def run_reference(reference, rules, calls, first_seed=0, make=make_tokens):
    """Run the reference on the first tokens whose selections are all clear.

    Args:
        reference (ReferenceModel): The model.
        rules (dict): Fields of `Rules`.
        calls (list of int): Length of each call.
        make (callable): Tokens [1, length] from a length and a seed.

    Returns:
        tuple: tokens [1, sum(calls)], the run, the logits of each call, and
        after each call the set of positions that each layer keeps.
    """
    for seed in range(first_seed, first_seed + 300):
        tokens = make(sum(calls), seed)
        ids = tokens[0].tolist()
        run = reference.start(Rules(**rules))
        logits, kept, start = [], [], 0
        for length in calls:
            logits.append(run.feed(ids[start : start + length]))
            kept.append([run.kept(i) for i in range(len(run.caches))])
            start += length
            if min(run.rules.margins, default=1.0) < MARGIN:
                break
        else:
            return tokens, run, logits, kept
    raise AssertionError("no tokens with clear selections: make the test smaller")


def run_program(model, indexers, rules, tokens, calls, row=0):
    """Patch, feed the same calls, and restore.

    Returns:
        tuple: the logits of each call as float64 [L, vocab], and after each call
        the set of positions that each layer keeps, both of one row of the batch.
    """
    with patch_sparse_generate(model, indexers, **{"evict": "index", **rules}):
        cache = lm_cache.make_prompt_cache(model)
        logits, kept, start = [], [], 0
        for length in calls:
            (out,) = feed_calls(model, tokens[:, start : start + length], [length], cache)
            logits.append(np.array(out[row].astype(mx.float32), dtype=np.float64))
            kept.append([kept_positions(c, row) for c in cache])
            start += length
    return logits, kept


def kept_positions(cache, row=0):
    """Return the positions that a cache of the program holds, as a set.

    mlx-lm's own caches (of layers left dense) keep everything.
    """
    if not hasattr(cache, "index_keys"):
        return set(range(cache.offset))
    positions = cache.positions[row, : cache.size()].tolist()
    assert len(set(positions)) == len(positions) == cache.size()
    return set(positions)


def difference(ours, theirs):
    """Return the largest difference over all calls."""
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
