"""Chunks of variable length, scored as wholes.

Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs
(DHSA), 2025 (arXiv 2510.24606). A text is cut into chunks by its content; a chunk's vector is the
mean of its tokens' times the square root of their number; the products of such vectors are the scores of all
pairs of tokens in two chunks, by which each query takes its best.
Deviations: the paper's boundaries are those of a small trained network that looks at the keys in a
window on each side, thinned so that none are neighbours. Here nothing is trained: a boundary stands
where the means of the keys on both sides, of all key heads together and rotated as they are, differ
most (least cosine) among the ``apart`` places on each side. It counts for a query once that is known,
``apart + window`` tokens later; what comes after the last one is an open chunk, of what the query sees,
so that no cut of a prompt into calls changes anything. A query stands alone in place of its
chunk in ``"exact"`` and in decode, where the paper has a chunk's queries share its score; in
prefill ``"tile"`` the tile is their chunk. Sinks and the newest keys are always read; of tokens with one score the
newer are. Sets are one a layer, by the sum over its heads (the paper has heads of their own).
Chunks are made anew from all keys at each step, as differences of running sums in float32: what is
selected is shown, not the speed.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import mlx.core as mx

from ..registry import register
from .rule import Probe, at_least
from .select_rule import SelectRule

_EPS = 1e-12


@register("select", "dhsa")
@dataclass(frozen=True)
class DHSA(SelectRule):
    """Read the tokens of the chunks that score highest.

    Args:
        window (int): Keys on each side that a boundary is told by. Default: ``4``.
        apart (int): Places on each side among which a boundary is the best. Default: ``8``.
    """

    window: int = 4
    apart: int = 8

    def __post_init__(self):
        at_least("select", "dhsa", window=(self.window, 1), apart=(self.apart, 0))

    def scores(self, probe, cache, n_visible, end):
        keys = cache.keys[:, :, :end].astype(mx.float32)
        B, n_kv_heads, _, D = keys.shape
        L = probe.queries.shape[2]
        queries = probe.queries.astype(mx.float32).reshape(B, n_kv_heads, -1, L, D).sum(axis=2)
        sums = mx.pad(mx.cumsum(keys, axis=2), [(0, 0), (0, 0), (1, 0), (0, 0)])  # before each place
        begins = self.boundaries(keys)
        chunk = mx.cumsum(begins.astype(mx.int32), axis=-1)  # of each token; the first is 0
        starts = self._starts(begins, chunk)

        # Chunks that are closed are the same for all queries.
        vectors = _vectors(_at(sums, starts[:, :-1]), _at(sums, starts[:, 1:]), starts[:, :-1], starts[:, 1:])
        closed = (queries @ vectors.swapaxes(-1, -2)).sum(axis=1)  # [B, L, chunks]
        # The open one begins at the last boundary that is known.
        n_visible = n_visible.astype(mx.int32)
        known = mx.maximum(n_visible - self.apart - self.window, 0)
        last = mx.take(chunk, known, axis=1)  # [B, L]
        first = mx.take_along_axis(starts, last, axis=1)
        seen = mx.broadcast_to(n_visible, (B, L))
        open_vectors = _vectors(_at(sums, first), _at(sums, seen), first, seen)
        opened = (queries * open_vectors).sum(axis=(1, 3))[..., None]
        of_token = mx.broadcast_to(chunk[:, None], (B, L, end))
        scores = mx.take_along_axis(closed, of_token, axis=-1)
        return mx.where(of_token >= last[..., None], opened, scores)

    def tile_scores(self, probe, cache, tile_size, end, first):
        B, n_heads, L, D = probe.queries.shape
        queries = probe.queries.astype(mx.float32).reshape(B, n_heads, L // tile_size, tile_size, D)
        before = mx.arange(end - L, end, tile_size)
        pooled = Probe(queries.mean(axis=3), probe.weights[:, ::tile_size])
        return self.scores(pooled, cache, before, end - tile_size)

    def boundaries(self, keys: mx.array) -> mx.array:
        """Tell where chunks begin, the first one aside.

        Args:
            keys (mx.array): ``[B, Hkv, T, D]`` in float32.

        Returns:
            mx.array: ``[B, T]``. What keys from a place's ``apart + window`` on hold changes nothing.
        """
        B, _, T, _ = keys.shape
        places = mx.arange(T, dtype=mx.int32)
        padded = mx.pad(keys, [(0, 0), (0, 0), (self.window, self.window), (0, 0)])
        # Added up anew for each place: of sums from the start on, rounding would decide.
        sums = functools.reduce(operator.add, (padded[:, :, i : i + T + self.window] for i in range(self.window)))
        left, right = sums[:, :, :T], sums[:, :, self.window :]
        dot, a, b = ((x * y).sum(axis=(1, 3)) for x, y in ((left, right), (left, left), (right, right)))
        differ = 1 - dot * mx.rsqrt(a * b + _EPS)  # [B, T]
        # A place without a whole window after it is none yet; nor is the text's first.
        differ = mx.where((places > 0) & (places <= T - self.window), differ, -mx.inf)
        padded = mx.pad(differ, [(0, 0), (self.apart, self.apart)], constant_values=-mx.inf)
        width = 2 * self.apart + 1
        around = mx.as_strided(padded, (B, T, width), (T + 2 * self.apart, 1, 1))
        # Of equal ones the first.
        best = mx.argmax(around, axis=-1) == self.apart
        return best & (places > 0) & (places <= T - self.window - self.apart)

    def _starts(self, begins, chunk) -> mx.array:
        """Return where each chunk begins ``[B, chunks + 1]``, the end of the text after the last."""
        B, T = begins.shape
        most = T // (self.apart + 1) + 2  # boundaries are further apart than that
        starts = mx.full((B, most + 1), T, mx.int32)
        places = mx.broadcast_to(mx.arange(T, dtype=mx.int32), (B, T))
        starts[:, 0] = 0
        # One column takes what begins nothing.
        into = mx.where(begins, chunk, most)
        return mx.put_along_axis(starts, into, mx.where(begins, places, T), axis=1)


def _at(sums, places) -> mx.array:
    """Return sums before places ``[B, n]``: ``[B, Hkv, n, D]``."""
    return mx.take_along_axis(sums, places[:, None, :, None], axis=2)


def _vectors(before, after, starts, stops) -> mx.array:
    """Return chunks' means times the root of their lengths: ``[B, Hkv, n, D]``."""
    lengths = mx.maximum(stops - starts, 1).astype(mx.float32)
    return (after - before) * mx.rsqrt(lengths)[:, None, :, None]
