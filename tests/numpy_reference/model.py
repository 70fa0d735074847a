"""The forward pass: one sequence, call by call, with a cache per layer."""

import numpy as np

from .weights import copy_indexer, copy_layer, linear, rms_norm, softmax, weight_of


class LayerCache:
    """Entries of one layer, oldest first, and the last prompt queries."""

    def __init__(self):
        self.offset = 0
        self.positions = np.zeros(0, dtype=np.int64)
        self.entries = None
        self.observed = []
        self.open = True  # a prompt begins, or goes on

    def append(self, *arrays):
        """Add keys, values and index keys [L, ...] at the next positions."""
        length = len(arrays[0])
        new = np.arange(self.offset, self.offset + length)
        self.positions = np.concatenate([self.positions, new])
        if self.entries is None:
            self.entries = list(arrays)
        else:
            self.entries = [
                np.concatenate(pair) for pair in zip(self.entries, arrays)
            ]
        self.offset += length
        return new

    def keep(self, positions):
        stays = np.isin(self.positions, sorted(positions))
        self.positions = self.positions[stays]
        self.entries = [e[stays] for e in self.entries]


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
            merit = eviction_scores(self.model.indexers[i], cache.observed, cache)
            cache.keep(rules.prune(cache.positions, merit, cache.offset - 1))

    def _attend(self, i, layer, x, ends=True):
        cache, length = self.caches[i], len(x)
        indexer = self.model.indexers.get(i)
        if i in self.rules.dense_layers:
            indexer = None
        start = cache.offset
        new = np.arange(start, start + length)

        def heads(y, n):
            return y.reshape(length, n, layer.head_dim)

        q = layer.rope(layer.q_norm(heads(layer.q(x), layer.n_heads)), new)
        k = layer.rope(layer.k_norm(heads(layer.k(x), layer.n_kv_heads)), new)
        v = heads(layer.v(x), layer.n_kv_heads)
        index_keys = indexer.keys(x, new) if indexer else np.zeros((length, 0))
        cache.append(k, v, index_keys)

        if indexer:
            iq, iw = indexer.queries(x, new)
            sets, stays = self._decide(cache, indexer, iq, iw, new, ends)
        else:
            sets = [set(cache.positions[cache.positions <= p].tolist()) for p in new]
            stays = None
        for p, chosen in zip(new.tolist(), sets):
            self.selected[i][p] = frozenset(chosen)

        mask = np.array([np.isin(cache.positions, sorted(s)) for s in sets])
        out = attention(q, cache.entries[0], cache.entries[1], mask)
        if stays is not None:
            cache.keep(stays)
        return layer.o(out.reshape(length, -1))

    def _decide(self, cache, indexer, iq, iw, new, ends=True):
        """Return the set of each query, and what stays (None: everything)."""
        rules, positions = self.rules, cache.positions
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
            merit = eviction_scores(indexer, cache.observed, cache)
            cache.observed = []
            if rules.cache == "full" or total <= rules.top_k:
                return sets, None
            return sets, rules.prune(positions, merit, query)

        if total <= rules.top_k:
            return causal, None
        if rules.cache == "full":
            return [rules.select(positions, scores[0], query)], None
        stays = rules.drop_one(positions, scores[0], query)
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
