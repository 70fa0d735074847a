"""Which keys a query attends to, and which entries a cache keeps.

Everything is a set of positions (tokens counted from the start of the
conversation). Scores come as a dict or array in the order of `positions`.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Rules:
    """The fields of a SparseConfig that decide the result."""

    top_k: int
    n_sink: int = 4
    n_recent: int = 64
    cache: str = "budget"
    prefill: str = "exact"
    tile_size: int = 64
    stream_chunk: int = 2048
    positions: str = "absolute"
    observation_window: int = 32
    evict: str = "index"
    dense_layers: tuple = ()
    margins: list = field(default_factory=list, repr=False)

    def mode(self):
        if self.prefill != "auto":
            return self.prefill
        fits = self.top_k >= self.tile_size + self.n_sink + self.n_recent
        return "tile" if fits else "exact"

    def best(self, positions, scores, forced, count, zeros=None):
        """Return `forced` and the best-scored others, `count` in all.

        Higher scores first; on equal scores the newer position. The distance
        between the last one in and the first one out is noted in `margins`:
        where it is below rounding, float32 may decide otherwise. `zeros` tells
        which scores are made of a zero of the ReLU (default: those that are 0).
        """
        zero = dict(zip(positions.tolist(), scores == 0 if zeros is None else zeros))
        free = [
            (score, position) for position, score in zip(positions.tolist(), scores.tolist()) if position not in forced
        ]
        free.sort(reverse=True)
        room = max(count - len(forced), 0)
        if 0 < room < len(free):
            (inside, first), (outside, second) = free[room - 1 : room + 1]
            # What two zeros of the ReLU lead to is equal in every precision.
            if not (inside == outside and zero[first] and zero[second]):
                spread = np.abs(scores).max()
                self.margins.append((inside - outside) / spread)
        return set(forced) | {position for _, position in free[:room]}

    def protected(self, positions, newest):
        """Return the sinks and the `n_recent` positions that end at `newest`."""
        return {p for p in positions.tolist() if p < self.n_sink or newest - self.n_recent < p <= newest}

    def select(self, positions, scores, query):
        """Return the set of a query at position `query`."""
        seen = positions <= query
        positions, scores = positions[seen], scores[seen]
        if len(positions) <= self.top_k:
            return set(positions.tolist())
        forced = self.protected(positions, query)
        return self.best(positions, scores, forced, self.top_k)

    def select_tiles(self, positions, scores, queries):
        """Return the sets of neighbouring queries that share their selection.

        Args:
            positions: [T], every entry, the queries' own included.
            scores: [L, T].
            queries: [L], the positions of this call.
        """
        sets = []
        for tile in np.unique(queries // self.tile_size):
            rows = np.flatnonzero(queries // self.tile_size == tile)
            first, last = queries[rows[0]], queries[rows[-1]]
            earlier = positions < first
            if len(rows) == 1:
                sets.append(self.select(positions, scores[rows[0]], first))
                continue
            if last + 1 <= self.top_k:
                shared = set(positions[earlier].tolist())
            elif earlier.sum() <= self.top_k - self.tile_size:
                shared = set(positions[earlier].tolist())
            else:
                forced = self.protected(positions[earlier], first - 1)
                own_scores = scores[rows][:, earlier]
                above = own_scores - self.levels(own_scores)[:, None]
                at_best = own_scores[above.argmax(0), np.arange(earlier.sum())]
                shared = self.best(
                    positions[earlier],
                    above.max(0),
                    forced,
                    self.top_k - self.tile_size,
                    zeros=at_best == 0,
                )
            for row in rows:
                own = set(range(int(first), int(queries[row]) + 1))
                sets.append(shared | own)
        return sets

    def levels(self, scores):
        """Return the level [L] of queries with `scores` [L, T] before their tile."""
        sample = scores[:, : max(scores.shape[1] - self.n_recent, 0)][:, 16::32]
        if not sample.size:
            return np.zeros(len(scores))
        top = sample.max(1)
        return top + np.log(np.exp(sample - top[:, None]).sum(1))

    def prune(self, positions, scores, newest):
        """Return what stays when a prompt ends: `top_k` entries."""
        if self.evict == "window":
            sinks = {p for p in positions.tolist() if p < self.n_sink}
            others = sorted(set(positions.tolist()) - sinks)
            return sinks | set(others[len(others) - (self.top_k - len(sinks)) :])
        forced = self.protected(positions, newest)
        return self.best(positions, scores, forced, self.top_k, zeros=self._shared(scores))

    def drop_one(self, positions, scores, newest):
        """Return what stays of `top_k` entries and the new one."""
        if self.evict == "window":
            return self.prune(positions, scores, newest)
        forced = self.protected(positions, newest) | {int(newest)}
        return self.best(positions, scores, forced, self.top_k, zeros=self._shared(scores))

    def _shared(self, scores):
        """Tell which scores are equal in every precision where they are equal here."""
        if self.evict == "index":
            return None
        return np.ones(len(scores), bool)  # of one neighbour
