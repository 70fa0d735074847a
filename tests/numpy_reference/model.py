"""The forward pass: one sequence, call by call, with a cache per layer."""

import numpy as np

from .weights import copy_indexer, copy_layer, linear, rms_norm, softmax, weight_of

# Positions beside a token that are kept with it; steps that are planned at once, and from how many on.
POOL_RADIUS = 4
PLANNED, PLANNED_FROM = 256, 4


class LayerCache:
    """Entries of one layer, oldest first, and the last prompt queries.

    Attributes:
        numbers: what each key, kept unrotated, is rotated by whenever it is attended to.
        number: that of the next token.
        worth: what orders entries for eviction where that is decided once.
        planned: steps until entries are numbered anew.
    """

    def __init__(self):
        self.offset = self.number = self.planned = 0
        self.positions = np.zeros(0, dtype=np.int64)
        self.numbers = np.zeros(0, dtype=np.int64)
        self.worth = np.zeros(0)
        self.entries = None
        self.observed = []
        self.open = True  # a prompt begins, or goes on

    def next_numbers(self, length):
        """Return what the next tokens are rotated by."""
        return np.arange(self.number, self.number + length)

    def append(self, *arrays):
        """Add keys, values, index keys and own scores [L, ...] at the next positions."""
        length = len(arrays[0])
        new = np.arange(self.offset, self.offset + length)
        self.positions = np.concatenate([self.positions, new])
        self.numbers = np.concatenate([self.numbers, self.next_numbers(length)])
        self.worth = np.concatenate([self.worth, arrays[3]])
        if self.entries is None:
            self.entries = list(arrays)
        else:
            self.entries = [np.concatenate(pair) for pair in zip(self.entries, arrays)]
        self.offset += length
        self.number += length
        return new

    def keep(self, positions):
        stays = np.isin(self.positions, sorted(positions))
        self.positions, self.numbers = self.positions[stays], self.numbers[stays]
        self.worth = self.worth[stays]
        self.entries = [e[stays] for e in self.entries]

    def renumber(self):
        """Number what is kept from 0 on, in the order of the text."""
        self.number = len(self.positions)
        self.numbers = np.arange(self.number)


class ReferenceRun:
    """One conversation: feed it the calls that the program gets.

    Attributes:
        selected: layer -> position of a query -> the set it attended to.
        caches: one LayerCache a layer.
    """

    def __init__(self, model, rules):
        self.model, self.rules = model, rules
        self.caches = [LayerCache() for _ in model.layers]
        self.selected = [{} for _ in model.layers]

    def feed(self, tokens):
        """Run one call and return its logits, [L, vocab]."""
        h = self.model.embedding[np.asarray(tokens)]
        for i, layer in enumerate(self.model.layers):
            h = h + self.attend(i, layer, layer.input_norm(h))
            h = h + layer.mlp(layer.mlp_norm(h))
        return self.model.head(self.model.norm(h))

    def feed_all(self, tokens, chunk):
        """Feed `tokens` in calls of `chunk` and return all logits."""
        parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        return np.concatenate([self.feed(part) for part in parts])

    def trim(self, n):
        """Take back the newest `n` tokens, and what their queries decided."""
        for cache in self.caches:
            cache.offset -= n
            cache.number -= n
            cache.keep(cache.positions[cache.positions < cache.offset].tolist())
            cache.observed = [o for o in cache.observed if o[0] < cache.offset]
            cache.open = True

    def kept(self, layer):
        """Return the set of positions that a layer's cache holds."""
        return set(self.caches[layer].positions.tolist())

    def attend(self, i, layer, x):
        cache, rules = self.caches[i], self.rules
        streams = rules.prefill == "stream" and i not in rules.dense_layers
        if not (streams and (len(x) > 1 or cache.open)):
            return self._attend(i, layer, x)
        # A token at a time: each sees what is there, and is cut away where its turn comes.
        goes_on, outputs = len(x) > 1, []
        for n in range(len(x)):
            cache.open = True
            if n == len(x) - 1 and not goes_on:
                outputs.append(self._attend(i, layer, x[n:]))
            else:
                outputs.append(self._attend(i, layer, x[n : n + 1], ends=False))
                self._cut(cache, i)
        cache.open = goes_on
        return np.concatenate(outputs)

    def _cut(self, cache, i):
        rules = self.rules
        if cache.offset % rules.stream_chunk == 0 and len(cache.positions) > rules.top_k:
            self._prune(cache, i)

    def _prune(self, cache, i):
        rules = self.rules
        merit = self._merit(cache, i)
        stays = rules.prune(cache.positions, merit, cache.offset - 1)
        if rules.evict in ("retention", "keydiff", "blend"):
            cache.worth = merit
        cache.keep(stays)
        cache.planned = 0
        if rules.positions == "compact":
            cache.renumber()

    def _merit(self, cache, i):
        """Return what orders all entries of a cache now."""
        rules, layer = self.rules, self.model.layers[i]
        if rules.evict == "retention":
            return pooled(cache.entries[3], cache.positions)
        if rules.evict in ("keydiff", "blend"):
            unlike = pooled(keydiff(layer.rope(cache.entries[0], cache.numbers)), cache.positions)
            if rules.evict == "keydiff":
                return unlike
            return sum((s - s.mean()) / s.std() for s in (pooled(cache.entries[3], cache.positions), unlike))
        return eviction_scores(self.model.indexers[i], cache.observed, cache)

    def _plan(self, cache, i):
        """Before a step whose cache is full: number anew what is kept, where it is time.

        Orders that no query changes are known for some steps; before any younger entry may go.
        """
        rules = self.rules
        plans = rules.evict != "index" and rules.n_recent >= PLANNED_FROM
        if rules.evict in ("keydiff", "blend") and not (plans and cache.planned):
            cache.worth = self._merit(cache, i)
        if plans and not cache.planned:
            cache.planned = min(rules.n_recent, PLANNED)
            if rules.positions == "compact":
                cache.renumber()

    def _attend(self, i, layer, x, ends=True):
        cache, length = self.caches[i], len(x)
        indexer = self.model.indexers.get(i)
        if i in self.rules.dense_layers:
            indexer = None
        new = np.arange(cache.offset, cache.offset + length)
        in_decode = indexer and length == 1 and not cache.open and self.rules.cache == "budget"
        if in_decode and len(cache.positions) == self.rules.top_k:
            self._plan(cache, i)
            cache.planned -= 1
        elif length > 1 or cache.open:
            cache.planned = 0  # a prompt puts what is planned back in order
        numbers = cache.next_numbers(length)

        def heads(y, n):
            return y.reshape(length, n, layer.head_dim)

        q = layer.rope(layer.q_norm(heads(layer.q(x), layer.n_heads)), numbers)
        k = layer.k_norm(heads(layer.k(x), layer.n_kv_heads))
        v = heads(layer.v(x), layer.n_kv_heads)
        index_keys = indexer.keys(x, new) if indexer else np.zeros((length, 0))
        own = indexer.retention(x) if indexer and indexer.retention else np.zeros(length)
        cache.append(k, v, index_keys, own)

        if indexer:
            iq, iw = indexer.queries(x, new)
            sets, stays = self._decide(cache, i, iq, iw, new, ends)
        else:
            sets = [set(cache.positions[cache.positions <= p].tolist()) for p in new]
            stays = None
        for p, chosen in zip(new.tolist(), sets):
            self.selected[i][p] = frozenset(chosen)

        mask = np.array([np.isin(cache.positions, sorted(s)) for s in sets])
        keys = layer.rope(cache.entries[0], cache.numbers)
        out = attention(q, keys, cache.entries[1], mask)
        if stays == "pruned":
            self._prune(cache, i)
            cache.observed = []
        elif stays is not None:
            cache.keep(stays)
        return layer.o(out.reshape(length, -1))

    def _decide(self, cache, i, iq, iw, new, ends=True):
        """Return the set of each query, and what stays (None: everything)."""
        rules, positions, indexer = self.rules, cache.positions, self.model.indexers[i]
        scores = indexer.scores(iq, iw, cache.entries[2])
        causal = [set(positions[positions <= p].tolist()) for p in new]

        query, total = int(new[-1]), len(positions)
        in_prompt = len(new) > 1 or cache.open
        cache.open = len(new) > 1 or not ends
        if in_prompt:
            cache.observed += list(zip(new.tolist(), iq, iw))
            cache.observed = cache.observed[-rules.observation_window :]
            sets = causal
            if total > rules.top_k and rules.mode() == "tile":
                sets = rules.select_tiles(positions, scores, new)
            elif total > rules.top_k and rules.mode() == "exact":
                sets = [rules.select(positions, s, p) for p, s in zip(new, scores)]
            if cache.open:
                return sets, None
            # A call of one token ends the prompt: it attends as the others did.
            if rules.cache == "full" or total <= rules.top_k:
                cache.observed = []
                return sets, None
            return sets, "pruned"

        if total <= rules.top_k:
            return causal, None
        if rules.cache == "full":
            return [rules.select(positions, scores[0], query)], None
        merit = scores[0] if rules.evict == "index" else cache.worth
        stays = rules.drop_one(positions, merit, query)
        return [stays], stays


def eviction_scores(indexer, observed, cache):
    """Return the mean index score of each entry over the queries that see it."""
    total = np.zeros(len(cache.positions))
    count = np.zeros(len(cache.positions))
    for position, q, w in observed:
        sees = cache.positions <= position
        scores = indexer.scores(q[None], w[None], cache.entries[2])[0]
        total += np.where(sees, scores, 0.0)
        count += sees
    return total / count


def pooled(scores, positions):
    """Return for each entry the best score of those up to POOL_RADIUS positions away."""
    near = np.abs(positions[:, None] - positions) <= POOL_RADIUS
    return np.where(near, scores, -np.inf).max(1)


def keydiff(keys):
    """Return minus the cosine of each key [T, heads, D] to the mean direction of its head, over heads."""
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    mean = keys.mean(0)
    return -(keys * mean / np.linalg.norm(mean, axis=-1, keepdims=True)).sum(-1).mean(1)


def attention(q, k, v, mask):
    """Softmax attention over the keys that `mask` [L, T] allows; GQA."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("lhd,thd->hlt", q, k) / np.sqrt(q.shape[-1])
    weights = softmax(np.where(mask[None], scores, -np.inf))
    return np.einsum("hlt,thd->lhd", weights, v)


class ReferenceModel:
    """A float64 copy of an mlx-lm model and of its indexers.

    Args:
        model: `mlx_lm.models.qwen3.Model` or `qwen3_moe.Model`, unpatched.
        indexers: layer -> indexer.
    """

    def __init__(self, model, indexers):
        args = model.args
        self.embedding = weight_of(model.model.embed_tokens)
        self.layers = [copy_layer(block, args) for block in model.model.layers]
        self.indexers = {i: copy_indexer(x, args) for i, x in indexers.items()}
        self.norm = rms_norm(model.model.norm.weight, args.rms_norm_eps)
        if args.tie_word_embeddings:
            self.head = lambda x: x @ self.embedding.T
        else:
            self.head = linear(model.lm_head)

    def start(self, rules):
        return ReferenceRun(self, rules)
