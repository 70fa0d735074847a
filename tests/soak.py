"""Decode for very long on a fixed budget: memory stays, positions and offset are exact.

    python tests/soak.py 1000000

Takes a few minutes for a million steps; prints one line for each tenth, then one JSON.
"""

import json
import os
import sys
import time

import mlx.core as mx
import numpy as np
from builders import VOCAB, make_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import Indexer, IndexerArgs, patch_sparse_generate

RULES = dict(top_k=32, n_sink=4, n_recent=8, evict="retention")
PROMPT = 80


class Coarse:
    """A retention head in steps of 1/256, so that rounding decides nothing."""

    def __init__(self, head):
        self.head = head

    def __call__(self, x):
        return self.finish(self.head.up(x))

    def finish(self, hidden):
        return mx.round(self.head.finish(hidden) * 256) / 256


class Simulation:
    """What a budget keeps, one step after another, in NumPy.

    Args:
        positions, worth (np.ndarray): Of the entries there are ``[top_k]``.
    """

    def __init__(self, positions, worth):
        self.positions, self.worth = positions.copy(), worth.copy()

    def step(self, position, worth):
        """Put the next token in the place of the entry that is worth least."""
        old = self.positions <= position - RULES["n_recent"]
        candidates = np.flatnonzero(old & (self.positions >= RULES["n_sink"]))
        least = candidates[np.lexsort((self.positions[candidates], self.worth[candidates]))[0]]
        self.positions[least], self.worth[least] = position, worth


def resident_bytes():
    """Return the memory of this process, where the system tells it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def active_bytes(cache):
    """Return the memory of arrays when nothing is left to be computed."""
    mx.eval(cache.contents)
    mx.synchronize()
    return mx.get_active_memory()


def soak(steps, check_every=1000, tell=lambda line: None):
    """Decode random tokens, and check what is kept every so often.

    Args:
        steps (int): Tokens to decode, at least 2,000.
        check_every (int): Steps from check to check, a multiple of ``n_recent``.
        tell (callable): Is given a line of text ten times.

    Returns:
        dict: Memory in bytes after the first thousand steps and at the end, the
        offset, and what was checked.

    Raises:
        AssertionError: If a cache keeps other positions than the rules say.
    """
    model = make_model(hidden=32, heads=2, kv_heads=1, head_dim=16, layers=1)
    mx.random.seed(5)
    indexer = Indexer(IndexerArgs(32, 2, 8, 4, retention_dim=8))
    tokens = np.random.default_rng(0).integers(0, VOCAB, PROMPT + steps + 1, np.int32)
    checks, early, start = 0, None, time.perf_counter()
    with patch_sparse_generate(model, {0: indexer}, **RULES) as patch:
        bound = patch.layers[0].indexer
        bound.retention = Coarse(bound.retention)
        # A token's worth in the first layer depends on nothing before it.
        x = model.layers[0].input_layernorm(model.model.embed_tokens(mx.arange(VOCAB)[None]))
        worth_of = np.array(bound.retention(x))[0]
        (cache,) = make_prompt_cache(model)
        mx.eval(model(mx.array(tokens[None, :PROMPT]), cache=[cache]))
        mx.eval(model(mx.array(tokens[None, PROMPT : PROMPT + 1]), cache=[cache]))
        patch.prune([cache])
        kept = Simulation(np.array(cache.positions[0]), np.array(cache.worth[0]))
        for step in range(1, steps + 1):
            at = PROMPT + step
            mx.async_eval(model(mx.array(tokens[None, at : at + 1]), cache=[cache]))
            kept.step(at, worth_of[tokens[at]])
            if step % check_every == 0:
                assert cache.size() == RULES["top_k"]
                assert cache.offset == PROMPT + 1 + step
                assert sorted(cache.positions[0].tolist()) == sorted(kept.positions.tolist())
                checks += 1
            if step == 1000:
                early = active_bytes(cache), resident_bytes()
            if step % max(1, steps // 10) == 0:
                speed = (time.perf_counter() - start) / step
                tell(f"{step:,} steps, {1e6 * speed:.0f} us each, {active_bytes(cache):,} bytes active")
        return {
            "steps": steps,
            "checks": checks,
            "offset": cache.offset,
            "active_bytes": [early[0], active_bytes(cache)],
            "resident_bytes": [early[1], resident_bytes()],
            "oldest_kept": sorted(kept.positions.tolist())[RULES["n_sink"]],
        }


if __name__ == "__main__":
    print(json.dumps(soak(int(sys.argv[1]), tell=lambda line: print(line, flush=True))))
