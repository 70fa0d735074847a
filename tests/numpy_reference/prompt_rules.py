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


def tree_search(n_sink, stop, n_nodes, block, score):
    """Return the slots that a search in `[n_sink, stop)` ends at, and the margin."""
    n = max(stop - n_sink, 0)
    if n_nodes < 1:
        return set(), 1.0
    nodes = [(n_sink + j * n // n_nodes, n_sink + (j + 1) * n // n_nodes) for j in range(n_nodes)]
    nodes, margin = [x for x in nodes if x[0] < x[1]], 1.0
    while any(b - a > block for a, b in nodes):
        halves = []
        for a, b in nodes:
            halves += [(a, (a + b) // 2), ((a + b) // 2, b)] if b - a > block else [(a, b)]
        halves = [(a, b) for a, b in halves if a < b]
        scores = {x: score((x[0] + x[1]) // 2) for x in halves}
        halves.sort(key=lambda x: (scores[x], x), reverse=True)
        if len(halves) > n_nodes:
            apart = scores[halves[n_nodes - 1]] - scores[halves[n_nodes]]
            margin = min(margin, apart / max(max(map(abs, scores.values())), 1e-9))
        nodes = halves[:n_nodes]
    return {s for a, b in nodes for s in range(a, b)}, margin


def hip(queries, keys, rules, block, heads=None):
    n = keys.shape[1]
    forced = forced_of(n, rules["n_sink"], rules["n_recent"])
    scores = sum(k @ q for q, k in grouped(queries, keys, heads))
    n_nodes = (rules["top_k"] - rules["n_sink"] - rules["n_recent"]) // block
    found, margin = tree_search(rules["n_sink"], n - rules["n_recent"], n_nodes, block, lambda s: scores[s])
    return forced | found, margin


def hip_tile(queries, keys, rules, block):
    before = keys.shape[1] - queries.shape[1]
    forced = forced_of(before, rules["n_sink"], rules["n_recent"])
    scores = np.max([sum(k @ q for q, k in grouped(queries[:, r], keys)) for r in range(queries.shape[1])], axis=0)
    n_nodes = (rules["top_k"] - rules["tile_size"] - rules["n_sink"] - rules["n_recent"]) // block
    found, margin = tree_search(rules["n_sink"], before - rules["n_recent"], n_nodes, block, lambda s: scores[s])
    return forced | found, margin


def s2o_segment(queries, keys, rules, scale, tau, block, before, count, heads=None):
    """Read for the queries `[Hq, R, D]` of a segment, the last of which sees all keys; of the first
    `before` slots at most `count`."""
    R, T = queries.shape[1], keys.shape[1]
    forced = forced_of(before, rules["n_sink"], rules["n_recent"])
    asked = [pair for r in range(R) for pair in grouped(queries[:, r], keys, heads)]
    sees = [T - R + 1 + r for r in range(R) for _ in range(len(asked) // R)]
    worth = sum(k[:before] @ q for q, k in asked) / R
    free = sorted(set(range(before)) - forced, key=lambda s: (worth[s], s), reverse=True)
    room = max(count - len(forced), 0)
    margin = 1.0
    if 0 < room < len(free):
        margin = (worth[free[room - 1]] - worth[free[room]]) / max(np.abs(worth).max(), 1e-9)
    shares = [np.exp((k[:n] @ q - (k[:n] @ q).max()) * scale) for (q, k), n in zip(asked, sees)]
    read = [forced | set(range(before, n)) for n in sees]
    chosen = set(forced)
    for start in range(0, min(room, len(free)), block):
        new = free[start : min(start + block, room)]
        if start + block < len(free):  # what of two stands in which block decides
            edge = worth[free[start + block - 1]] - worth[free[start + block]]
            margin = min(margin, edge / max(np.abs(worth).max(), 1e-9))
        gain = np.mean([p[new].sum() / p[sorted(had)].sum() for p, had in zip(shares, read)])
        chosen |= set(new)
        margin = min(margin, abs(gain - tau))
        if gain < tau:
            break
        read = [had | set(new) for had in read]
    return chosen, margin


def s2o(queries, keys, rules, scale, tau, block, heads=None):
    n = keys.shape[1]
    return s2o_segment(queries[:, None], keys, rules, scale, tau, block, n, rules["top_k"], heads)


def s2o_tile(queries, keys, rules, scale, tau, block):
    before = keys.shape[1] - queries.shape[1]
    return s2o_segment(queries, keys, rules, scale, tau, block, before, rules["top_k"] - rules["tile_size"])


def chunks(keys, window, apart):
    """Return where chunks of `[Hkv, n, D]` begin, the first at 0, and the margin."""
    n = keys.shape[1]
    flat = np.concatenate(list(keys), axis=-1)
    differ, margin = {}, 1.0
    for i in range(1, n - window + 1):
        a, b = flat[max(i - window, 0) : i].sum(0), flat[i : i + window].sum(0)
        differ[i] = 1 - a @ b / np.sqrt(a @ a * (b @ b))
    begins = [0]
    for i in range(1, n - window - apart + 1):
        others = [differ[j] for j in range(i - apart, i + apart + 1) if j in differ and j != i]
        if not others:
            begins.append(i)
            continue
        margin = min(margin, abs(differ[i] - max(others)))
        if differ[i] > max(others):
            begins.append(i)
    return begins, margin


def dhsa_scores(queries, keys, window, apart, seen):
    """Return the scores `[seen]` for a query `[Hq, D]` that sees as many keys."""
    begins, margin = chunks(keys[:, :seen], window, apart)
    scores = np.zeros(seen)
    for start, stop in zip(begins, [*begins[1:], seen]):
        vectors = keys[:, start:stop].mean(1) * np.sqrt(stop - start)
        scores[start:stop] = sum(k @ q for q, k in grouped(queries, vectors[:, None]))
    return scores, margin


def best_chunks(scores, forced, count):
    """As `best`, but tokens of one chunk are as good as each other."""
    free = sorted(set(range(len(scores))) - forced, key=lambda s: (scores[s], s), reverse=True)
    room, margin = max(count - len(forced), 0), 1.0
    if 0 < room < len(free) and scores[free[room - 1]] != scores[free[room]]:
        margin = (scores[free[room - 1]] - scores[free[room]]) / max(np.abs(scores).max(), 1e-9)
    return forced | set(free[:room]), margin


def dhsa(queries, keys, rules, window, apart, heads=None):
    n = keys.shape[1]
    scores, clear = dhsa_scores(queries, keys, window, apart, n)
    chosen, margin = best_chunks(scores, forced_of(n, rules["n_sink"], rules["n_recent"]), rules["top_k"])
    return chosen, min(margin, clear)


def dhsa_tile(queries, keys, rules, window, apart):
    before = keys.shape[1] - queries.shape[1]
    scores, clear = dhsa_scores(queries.mean(1), keys, window, apart, before)
    forced = forced_of(before, rules["n_sink"], rules["n_recent"])
    chosen, margin = best_chunks(scores, forced, rules["top_k"] - rules["tile_size"])
    return chosen, min(margin, clear)
