"""What the papers' ways to read a prompt select, in float64: one query or one tile at a time.

Functions return the set of slots and the margin, as in `rules.py`. Queries of a tile are
`[Hq, R, D]` at the newest slots of `[Hkv, T, D]`; a tile's set is of the slots before it.
"""

import numpy as np

from .rules import forced_of, grouped


def below_or_best(scores, forced, count, least):
    """Return `forced` and the others of at least this score, the best `count` in all."""
    free = sorted(set(range(len(scores))) - forced, key=lambda s: (scores[s], s), reverse=True)
    room = max(count - len(forced), 0)
    chosen = [s for s in free[:room] if scores[s] >= least]
    spread = max(np.abs(scores).max(), 1e-9)
    margin = min((abs(scores[s] - least) for s in free[: room + 1]), default=1.0) / spread
    if 0 < room < len(free) and len(chosen) == room:
        margin = min(margin, (scores[free[room - 1]] - scores[free[room]]) / spread)
    return forced | set(chosen), margin


def anchor(queries, keys, rules, scale, theta, heads=None):
    n = keys.shape[1]
    forced = forced_of(n, rules["n_sink"], rules["n_recent"])
    best = np.full(n, -np.inf)
    for q, k in grouped(queries, keys, heads):
        products = k @ q
        best = np.maximum(best, (products - max(products[s] for s in forced)) * scale)
    return below_or_best(best, forced, rules["top_k"], -theta)


def anchor_tile(queries, keys, rules, scale, theta):
    n_heads, R, _ = queries.shape
    before = keys.shape[1] - R
    forced = forced_of(before, rules["n_sink"], rules["n_recent"])
    best = np.full(before, -np.inf)
    for h in range(n_heads):
        k = keys[h * len(keys) // n_heads]
        anchors = []
        for r in range(R):
            near = [*forced, *range(before, before + r + 1)]
            anchors.append((k[near] @ queries[h, r] * scale).max())
        pooled = queries[h].mean(0)
        best = np.maximum(best, k[:before] @ pooled * scale - np.mean(anchors))
    return below_or_best(best, forced, rules["top_k"] - rules["tile_size"], -theta)
