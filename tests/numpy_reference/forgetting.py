"""Rules of forgetting, from their definitions: a text read densely, cut, and continued.

A rule here is a class with `worth(view)` (what orders entries at the prompt's end) and, where
they differ, `step(view)` (before a token is written over an entry), `after(view)` (once it is)
and `merged(view, stays)` (the values of what stays).
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from .model import attention, keydiff
from .weights import softmax


@dataclass
class Entries:
    """Of one layer: unrotated keys, values `[T, Hkv, D]`, positions and scores `[T]`."""

    layer: object
    index: int
    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    scores: np.ndarray
    queries: np.ndarray | None = None  # unrotated, of the call at hand [L, Hq, D]
    asked_at: np.ndarray | None = None

    @property
    def rotated(self):
        return self.layer.rope(self.keys, self.positions)

    def paid(self, n=None):
        """Return the attention of the last `n` queries at hand, the mean of the heads `[n, T]`."""
        n = n or len(self.queries)
        at = self.asked_at[-n:]
        q, k = self.layer.rope(self.queries[-n:], at), self.rotated
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        logits = np.einsum("lhd,thd->hlt", q, k) / np.sqrt(q.shape[-1])
        return softmax(np.where(self.positions <= at[:, None], logits, -np.inf)).mean(0)

    def keep(self, stays):
        for name in ("keys", "values", "positions", "scores"):
            setattr(self, name, getattr(self, name)[stays])


def pool(scores, positions, radius):
    near = np.abs(positions[:, None] - positions) <= radius
    return np.where(near, scores, -np.inf).max(1)


@dataclass
class Order:
    """What all rules have: by default each step asks anew."""

    newer = 0.0  # score of what is read

    def step(self, view):
        return self.worth(view)

    def after(self, view):
        pass

    def merged(self, view, stays, worth):
        return view.values[stays]


@dataclass
class Final(Order):
    """What is decided at the prompt's end stands; later tokens have the best score."""

    newer = np.inf

    def step(self, view):
        return view.scores

    def worth(self, view):
        view.scores = self.at_end(view)
        return view.scores


@dataclass
class Window(Order):
    def worth(self, view):
        return view.positions.astype(float)


@dataclass
class Random(Order):
    seed: int = 0

    def worth(self, view):
        return np.array([self._hash(p, view.index) for p in view.positions.tolist()])

    def _hash(self, position, layer):
        x = (position + self.seed * 1_000_003 + layer * 7919) % 2**32
        for factor in (0x7FEB352D, 0x846CA68B):
            x = (x ^ (x >> 16)) * factor % 2**32
        return float(np.float32(x ^ (x >> 16)))


@dataclass
class KNorm(Order):
    radius: int = 0

    def worth(self, view):
        norms = np.linalg.norm(view.keys, axis=-1).mean(1)
        return pool(-norms, view.positions, self.radius)


@dataclass
class KeyDiff(Order):
    radius: int = 4

    def worth(self, view):
        return pool(keydiff(view.rotated), view.positions, self.radius)


@dataclass
class SnapKV(Final):
    window: int = 8
    radius: int = 4

    def at_end(self, view):
        seen = view.positions <= view.asked_at[-self.window :, None]
        return pool(view.paid(self.window).sum(0) / seen.sum(0), view.positions, self.radius)


@dataclass
class TOVA(Order):
    def worth(self, view):
        return view.paid(1)[0]


@dataclass
class H2O(Order):
    mean: bool = False
    in_decode: bool = True

    def worth(self, view):
        view.scores = view.scores + view.paid().sum(0)
        return self.step(view)

    def step(self, view):
        since = view.asked_at[-1] + 1 - view.positions
        since = since if len(view.asked_at) > 1 else since - 1  # the newest is not there yet
        return view.scores / since if self.mean else view.scores

    def after(self, view):
        if self.in_decode:
            view.scores = view.scores + view.paid()[0]


@dataclass
class Expected(Final):
    queries: int = 30
    future: int = 16
    covariance: bool = True
    norms: bool = True
    epsilon: float = 0.0
    sinks: int = 4

    def at_end(self, view):
        D = view.keys.shape[-1]
        first = view.asked_at[-1] + 1
        basis = np.broadcast_to(np.eye(D)[None], (self.future, D, D))  # [position, "head", D]
        turn = view.layer.rope(basis, np.arange(first, first + self.future)).mean(0).T
        keys, queries = view.rotated, view.queries[-self.queries :]
        group = queries.shape[1] // keys.shape[1]
        free = view.positions >= self.sinks
        scores = np.zeros(len(view.positions))
        for head in range(queries.shape[1]):
            q, k = queries[:, head], keys[free, head // group]
            logits = k @ (turn @ q.mean(0)) / np.sqrt(D)
            if self.covariance:
                covariance = turn @ np.cov(q.T, bias=True) @ turn.T
                logits = logits + np.einsum("ti,ij,tj->t", k, covariance, k) / (2 * D)
            paid = softmax(logits[None])[0]
            if self.norms:
                paid = (paid + self.epsilon) * np.linalg.norm(view.values[free, head // group], axis=-1)
            scores[free] += paid / queries.shape[1]
        scores[~free] = np.inf
        return scores


@dataclass
class LagKV(Order):
    lag: int = 8
    sinks: int = 4

    def worth(self, view):
        T = len(view.positions)
        n = (T - self.sinks) // self.lag
        if n < 2:
            return np.arange(T) / T
        scores = np.ones(T)
        for part in range(n - 1):
            here = slice(self.sinks + part * self.lag, self.sinks + (part + 1) * self.lag)
            there = slice(here.stop, here.stop + self.lag)
            ranks = []
            for head in range(view.keys.shape[1]):
                score = 0
                for x in (view.rotated[:, head], view.values[:, head]):
                    low, high = x[there].min(0), x[there].max(0)
                    spread = ((x[here] - low) / (high - low)).std(1, ddof=1)
                    score = score + softmax(spread[None])[0]
                ranks.append(np.argsort(np.argsort(score)))
            scores[here] = np.sum(ranks, axis=0) / (len(ranks) * self.lag)
        return scores


@dataclass
class Merging(Order):
    """Over another rule, `base`; `weigh` makes weights of its worth."""

    base: Order = field(default_factory=KNorm)
    threshold: float = 0.3
    share: float = 1.0
    weigh: object = np.ones_like

    def __post_init__(self):
        self.newer, self.worth, self.step, self.after = (
            getattr(self.base, name) for name in ("newer", "worth", "step", "after")
        )

    def merged(self, view, stays, worth):
        gone = np.flatnonzero(~stays)
        best = sorted(gone, key=lambda i: (worth[i], i))[::-1][: round(self.share * stays.sum())]
        weights, keys, centres = self.weigh(worth), view.rotated, np.flatnonzero(stays)
        values = view.values.copy()
        for head in range(keys.shape[1]):
            k = keys[:, head] / np.linalg.norm(keys[:, head], axis=-1, keepdims=True)
            members = {c: [c] for c in centres}
            for i in best:
                alike = k[centres] @ k[i]
                if alike.max() >= self.threshold:
                    members[centres[alike.argmax()]].append(i)
            for c, of in members.items():
                if len(of) > 1:
                    values[c, head] = np.average(view.values[of, head], axis=0, weights=weights[of])
        return values[stays]


class Forgetting:
    """Read a prompt, cut it to a budget, and go on a token at a time.

    Args:
        reference (ReferenceModel): The model.
        order (Order): The rule.
        top_k, n_sink, n_recent (int): As in a SparseConfig.

    Attributes:
        caches: One `Entries` a layer.
        margins: At each decision the distance, in the measure of the largest score, of the best
            that went to the least that stayed. Equal ones don't count: then the newer stays.
    """

    def __init__(self, reference, order, top_k, n_sink, n_recent):
        self.model, self.order = reference, order
        self.limits = SimpleNamespace(top_k=top_k, n_sink=n_sink, n_recent=n_recent)
        self.caches, self.margins, self.offset = [], [], 0

    def feed(self, ids):
        """Return the logits after the prompt (first call, then it is cut) or a token."""
        is_prompt, positions = not self.caches, np.arange(self.offset, self.offset + len(ids))
        h = self.model.embedding[np.asarray(ids)]
        for i, layer in enumerate(self.model.layers):
            x = layer.input_norm(h)

            def heads(y, n):
                return y.reshape(len(ids), n, layer.head_dim)

            q = layer.q_norm(heads(layer.q(x), layer.n_heads))
            k = layer.k_norm(heads(layer.k(x), layer.n_kv_heads))
            v = heads(layer.v(x), layer.n_kv_heads)
            scores = np.full(len(ids), self.order.newer)
            if is_prompt:
                self.caches.append(Entries(layer, i, k, v, positions, scores))
            cache = self.caches[i]
            cache.queries, cache.asked_at = q, positions
            if not is_prompt:
                if len(cache.positions) == self.limits.top_k:
                    cache.keep(self._stays(cache.positions, self.order.step(cache), -1))
                for name, new in zip(("keys", "values", "positions", "scores"), (k, v, positions, scores)):
                    setattr(cache, name, np.concatenate([getattr(cache, name), new]))
            mask = cache.positions <= positions[:, None]
            out = attention(layer.rope(q, positions), cache.rotated, cache.values, mask)
            if not is_prompt:
                self.order.after(cache)
            elif len(ids) > self.limits.top_k:
                worth = self.order.worth(cache)
                stays = self._stays(cache.positions, worth, self.limits.top_k)
                merged = self.order.merged(cache, stays, worth)
                cache.keep(stays)
                cache.values = merged
            h = h + layer.o(out.reshape(len(ids), -1))
            h = h + layer.mlp(layer.mlp_norm(h))
        self.offset += len(ids)
        return self.model.head(self.model.norm(h))[-1]

    def _stays(self, positions, worth, count):
        """Return which entries stay `[T]`: `count`, or all but one (-1)."""
        is_step = count < 0
        newest = self.offset if is_step else positions[-1]
        free = (positions >= self.limits.n_sink) & (positions <= newest - self.limits.n_recent)
        n_gone = 1 if is_step else len(positions) - count
        order = sorted(np.flatnonzero(free), key=lambda i: (worth[i], positions[i]))
        if n_gone < len(order):
            last, first = worth[order[n_gone - 1]], worth[order[n_gone]]
            if last != first:
                self.margins.append((first - last) / np.abs(worth[np.isfinite(worth)]).max())
        stays = np.ones(len(positions), bool)
        stays[order[:n_gone]] = False
        return stays
