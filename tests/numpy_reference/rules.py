"""What rules of selecting read, in float64: one query and one set at a time.

Each function returns the set of slots and the margin: how far apart, of their largest, the
numbers are that the set hangs on. Queries are `[Hq, D]`, keys `[Hkv, T, D]`, all of them seen.
"""

import numpy as np


def forced_of(n, n_sink, n_recent):
    """Return the slots that are always read, of `n` that are seen."""
    return set(range(min(n_sink, n))) | set(range(max(n - n_recent, 0), n))


def best(scores, forced, count):
    """Return `forced` and the best of the others, the newer of equal ones."""
    free = sorted(set(range(len(scores))) - forced, key=lambda s: (scores[s], s), reverse=True)
    room = max(count - len(forced), 0)
    margin = 1.0
    if 0 < room < len(free):
        margin = (scores[free[room - 1]] - scores[free[room]]) / max(np.abs(scores).max(), 1e-9)
    return forced | set(free[:room]), margin


def grouped(queries, keys, heads=None):
    """Yield each query head and the keys of its head; of some key heads alone."""
    n_kv_heads = len(keys)
    group = len(queries) // n_kv_heads
    for h in range(n_kv_heads) if heads is None else heads:
        for query in queries[h * group : (h + 1) * group]:
            yield query, keys[h]


def quest(queries, keys, rules, page, heads=None):
    n = keys.shape[1]
    forced = forced_of(n, rules["n_sink"], rules["n_recent"])
    pages = [range(a, min(a + page, n)) for a in range(0, n, page)]
    bounds = [
        sum(np.maximum(q * k[list(p)].min(0), q * k[list(p)].max(0)).sum() for q, k in grouped(queries, keys, heads))
        for p in pages
    ]
    order = sorted(range(len(pages)), key=lambda i: (bounds[i], i), reverse=True)
    chosen, margin = set(forced), 1.0
    for place, i in enumerate(order):
        if len(chosen | set(pages[i])) > rules["top_k"]:
            if place:
                margin = (bounds[order[place - 1]] - bounds[i]) / np.abs(bounds).max()
            break
        chosen |= set(pages[i])
    return chosen, margin


def sparsek(queries, keys, rules, window, stride, heads=None):
    n = keys.shape[1]
    scores = sum(k @ q for q, k in grouped(queries, keys, heads))
    forced = forced_of(n, rules["n_sink"], max(rules["n_recent"], window + 1))
    strided = [s for s in range(0, n, stride)[::-1] if s not in forced] if stride else []
    forced |= set(strided[: rules["top_k"] - len(forced)])
    return best(scores, forced, rules["top_k"])


def power(n, rules, block=1, count=None):
    """Return the set of a query that sees `n` keys; what it may hang on is no number."""
    own = (n - 1) // block
    powers = {own - 2**i for i in range(own.bit_length())}
    chosen = forced_of(n, rules["n_sink"], rules["n_recent"])
    keys = range(n)[::-1]
    for s in [s for s in keys if s // block in powers] + [s for s in keys if s // block not in powers]:
        if len(chosen) < (count or rules["top_k"]):
            chosen.add(s)
    return chosen, 1.0


def oracle(queries, keys, rules, scale):
    total = 0
    for q, k in grouped(queries, keys):
        logits = k @ q * scale
        paid = np.exp(logits - logits.max())
        total = total + paid / paid.sum()
    forced = forced_of(keys.shape[1], rules["n_sink"], rules["n_recent"])
    return best(total / len(queries), forced, rules["top_k"])


def double_sparsity(queries, keys, rules, channels, scale, heads=None):
    """Of each key head some channels `[Hkv][n]` stand for its keys."""
    n_kv_heads = len(keys)
    group = len(queries) // n_kv_heads
    total = 0
    for h in range(n_kv_heads) if heads is None else heads:
        for q in queries[h * group : (h + 1) * group]:
            logits = keys[h][:, channels[h]] @ q[channels[h]] * scale
            paid = np.exp(logits - logits.max())
            total = total + paid / paid.sum()
    forced = forced_of(keys.shape[1], rules["n_sink"], rules["n_recent"])
    return best(total, forced, rules["top_k"])


def minference(queries, keys, n_visible, rules, pattern, share, last_q, block, scale):
    """Return a key head's sets for queries `[group, L, D]` that are read together, and the margin.

    The pattern is "a", "lines" or "blocks"; `n_visible[t]` keys are seen by query `t`.
    """
    top_k, n_sink, n_recent = (rules[name] for name in ("top_k", "n_sink", "n_recent"))
    T = len(keys)
    count = min(max(round(share * top_k), n_sink), top_k - n_recent)
    if pattern == "blocks":
        return _blocks(queries, keys, n_visible, rules, block, scale)
    vertical, slash, margin = set(range(count)), set(range(top_k - count)), 1.0
    if pattern == "lines":
        to_key, to_distance = np.zeros(T), np.zeros(T)
        for query in queries:
            for q, n in list(zip(query, n_visible))[-last_q:]:
                paid = np.exp((logits := keys[:n] @ q * scale) - logits.max())
                for s in range(n):
                    to_key[s] += paid[s] / paid.sum()
                    to_distance[n - 1 - s] += paid[s] / paid.sum()
        if len(n_visible) == 1:
            chosen, margin = best(to_key, forced_of(T, n_sink, n_recent), top_k)
            return [chosen], margin
        vertical, one = best(to_key, set(range(n_sink)), count)
        slash, other = best(to_distance, set(range(n_recent)), top_k - count)
        margin = min(one, other)
    sets = [{s for s in vertical if s < n} | {n - 1 - d for d in slash if d < n} for n in n_visible]
    return sets, margin


def _blocks(queries, keys, n_visible, rules, block, scale):
    sets, margin = [], 1.0
    for n in n_visible:
        own = (n - 1) // block
        together = [t for t, other in enumerate(n_visible) if (other - 1) // block == own]
        total = np.zeros(own)
        for query in queries:
            logits = np.array([keys[j * block : (j + 1) * block].mean(0) @ query[together].mean(0) for j in range(own)])
            paid = np.exp((logits - logits.max(initial=-1e9)) * scale)
            total += paid / paid.sum()
        chosen = forced_of(n, rules["n_sink"], rules["n_recent"])
        order = [own, *sorted(range(own), key=lambda j: (total[j], j), reverse=True)]
        for place, j in enumerate(order):
            wider = chosen | set(range(j * block, min((j + 1) * block, n)))
            if len(wider) > rules["top_k"]:
                if place > 1:
                    margin = min(margin, (total[order[place - 1]] - total[j]) / total.max())
                break
            chosen = wider
        sets.append(chosen)
    return sets, margin


def mixture(n, rules, alpha, beta):
    """Return a key head's set of a query that sees `n` keys."""
    width = min(max(int(np.floor(alpha + beta * n)), rules["n_recent"]), rules["top_k"] - rules["n_sink"])
    return set(range(min(rules["n_sink"], n))) | set(range(max(n - width, 0), n))


def top_p(scores, rules, p, least):
    """Return the set and the margin for index scores `[n]`."""
    n = len(scores)
    share = np.exp(scores - scores.max())
    share /= share.sum()
    forced = forced_of(n, rules["n_sink"], rules["n_recent"])
    chosen = set(forced)
    mass = share[list(forced)].sum()
    margin = 1.0
    for s in sorted(set(range(n)) - forced, key=lambda s: (scores[s], s), reverse=True):
        if len(chosen) >= rules["top_k"]:
            break
        margin = min(margin, abs(mass - p))
        if mass >= p and len(chosen) >= least:
            break
        chosen.add(s)
        mass += share[s]
    return chosen, margin


def attention(queries, keys, values, sets, scale):
    """Attend from each query to its own keys.

    Args:
        queries: `[Hq, L, D]`.
        keys, values: `[Hkv, T, D]`.
        sets: for each key head, for each query, a set of slots.

    Returns:
        `[Hq, L, D]`.
    """
    n_heads, L, D = queries.shape
    group = n_heads // len(keys)
    out = np.zeros((n_heads, L, D))
    for h in range(n_heads):
        for t in range(L):
            slots = sorted(sets[h // group][t])
            logits = keys[h // group][slots] @ queries[h, t] * scale
            paid = np.exp(logits - logits.max())
            out[h, t] = paid / paid.sum() @ values[h // group][slots]
    return out
