"""One state of the caches that is kept, and for which prompts it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .copies import trimmable


@dataclass(eq=False)
class Snapshot:
    """Caches that have read some tokens.

    Args:
        model (Any): The key of the model.
        tokens (np.ndarray): The tokens, int32. Of what begins with a document the first is
          the document's number, which is negative.
        caches (list): One cache a layer.
        kind (str): What ends there: see :func:`mlx_dsa.serve.segments.segments_of`.
        turn (int): Where in it the last turn of a user ends, 0 where that is not known.
    """

    model: Any
    tokens: np.ndarray
    caches: list[Any]
    kind: str
    turn: int = 0
    used: int = 0

    def measure(self):
        """Note what changes where caches are cut."""
        self.nbytes = sum(cache.nbytes for cache in self.caches)
        self.trimmable = trimmable(self.caches)

    def __len__(self) -> int:
        return len(self.tokens)


def usable(read: np.ndarray, wanted: np.ndarray, takes_back: int) -> int:
    """Return how many tokens of a prompt caches can stand for, one at least left to read.

    Args:
        read (np.ndarray): What the caches have read.
        wanted (np.ndarray): The prompt.
        takes_back (int): How many of the newest tokens the caches can give back.
    """
    n = min(common_tokens(read, wanted), len(wanted) - 1)
    return n if len(read) - n <= takes_back else 0


def common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    if not n:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def key_of(tokens: Sequence[int]) -> bytes:
    """Return tokens as a key, 4 bytes each."""
    return np.array(tokens, np.int32).tobytes()
