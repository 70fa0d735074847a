"""What a retention head learns from a sequence: which queries count, for which keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .data import Sequence
from .retention_config import RetentionConfig

_REPEAT = 16  # a stream of chance of its own


class Lesson(NamedTuple):
    """A token sequence with its part to be looked at, and who looks.

    Args:
        tokens (np.ndarray): Token ids ``[L]``, int32.
        queries (np.ndarray): Positions of the queries that count ``[Q]``,
          ascending, int32.
        n_keys (int): Keys that are learnt from: the first ones.
    """

    tokens: np.ndarray
    queries: np.ndarray
    n_keys: int


def make_lessons(sequences: list[Sequence], config: RetentionConfig) -> list[Lesson]:
    """Turn sequences into lessons; the seed decides which are read twice.

    Args:
        sequences (list of Sequence): Each longer than ``config.shortest``.
        config (RetentionConfig): The run.

    Returns:
        list of Lesson: In the same order.
    """
    rng = np.random.default_rng([config.seed, _REPEAT])
    twice = rng.random(len(sequences)) < config.repeat_share
    return [_read_twice(s) if again else read_once(s, config.min_distance) for s, again in zip(sequences, twice)]


def _read_twice(sequence: Sequence) -> Lesson:
    half = len(sequence.tokens) // 2
    tokens = np.concatenate([sequence.tokens[:half]] * 2)
    return Lesson(tokens, np.arange(half, 2 * half, dtype=np.int32), half)


def read_once(sequence: Sequence, min_distance: int) -> Lesson:
    """Learn from the keys that at least half of the queries come after.

    Args:
        sequence (Sequence): Its focus are the queries; all tokens are, where it has none
          or begins with a reply.
        min_distance (int): As in :class:`RetentionConfig`.
    """
    queries = sequence.focus
    middle = int(queries[len(queries) // 2]) if len(queries) else 0
    if middle <= 2 * min_distance:  # no conversation, or one that begins with a reply
        queries = np.arange(min_distance + 1, len(sequence.tokens), dtype=np.int32)
        middle = int(queries[len(queries) // 2])
    return Lesson(sequence.tokens, queries, middle - min_distance)


def stack_queries(lessons: list[Lesson]) -> np.ndarray:
    """Stack positions as ``[B, Q]``; shorter rows repeat their last one."""
    longest = max(len(lesson.queries) for lesson in lessons)
    return np.stack([np.pad(q, (0, longest - len(q)), mode="edge") for _, q, _ in lessons])
