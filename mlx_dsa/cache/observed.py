"""The queries that are observed at the end of a prompt."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Observed(NamedTuple):
    """The last prompt queries of the indexer, which decide what a prune keeps.

    Args:
        queries (mx.array): ``[B, Hi, W, Di]``.
        weights (mx.array): Head weights ``[B, W, Hi]``.
        positions (tuple of int): Their positions, ascending.
    """

    queries: mx.array
    weights: mx.array
    positions: tuple[int, ...]

    def joined(self, newer: Observed) -> Observed:
        """Return these queries and newer ones."""
        queries = mx.concatenate([self.queries, newer.queries], axis=2)
        weights = mx.concatenate([self.weights, newer.weights], axis=1)
        return Observed(queries, weights, self.positions + newer.positions)

    def last(self, n: int) -> Observed:
        """Return the newest ``n`` queries."""
        return Observed(self.queries[:, :, -n:], self.weights[:, -n:], self.positions[-n:])

    def before(self, position: int) -> Observed | None:
        """Return the queries before a position; ``None`` where there is none."""
        n = sum(p < position for p in self.positions)
        if not n:
            return None
        return Observed(self.queries[:, :, :n], self.weights[:, :n], self.positions[:n])
