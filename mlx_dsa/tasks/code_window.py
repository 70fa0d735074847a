"""Windows on source code, of an exact number of tokens."""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .source import Source

_TRIES = 400  # windows that are looked at for one that holds enough to ask for
_ROOM = 250  # tokens that a question and what is planted may take


class Lines(NamedTuple):
    """Some lines: from `start`, about, to before `stop`; those from `sure` on will be in the text."""

    start: int
    sure: int
    stop: int


@dataclass(frozen=True)
class Mark:
    """What is asked about: new lines before line `start`, or the lines `start` to `stop`."""

    start: int
    stop: int
    lines: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1)
def line_ends(source: Source, tokenizer: Any) -> list[float]:
    """Return tokens up to each line of a source, by its characters and what its file takes."""
    ends, start = [0.0], 0
    for stop in source.files:
        lines = source.lines[start:stop]
        n = len(tokenizer.encode(_joined(lines), add_special_tokens=False, verbose=False))
        share = n / sum(len(line) + 1 for line in lines)
        ends += [(len(line) + 1) * share for line in lines]
        start = stop
    return list(itertools.accumulate(ends))


class Window:
    """Stretches of source of an exact number of tokens.

    Args:
        source (Source): the code.
        encode (callable): from a text to its tokens.
        ends (list of float): about as many tokens as there are up to each line.
    """

    def __init__(self, source: Source, encode: Callable[[str], list[int]], ends: Sequence[float]) -> None:
        self._lines, self._encode = source.lines, encode
        self._ends = ends

    def choose(self, rng: random.Random, length: int, enough: Callable[[Lines], bool]) -> Lines:
        """Return lines of about `length` tokens, at random.

        Args:
            rng (random.Random): chooses.
            length (int): tokens.
            enough (callable): whether some lines hold enough to ask for.

        Raises:
            ValueError: if the source is too short, or no such lines are found.
        """
        first = bisect.bisect_left(self._ends, 1.2 * length)
        if first >= len(self._lines):
            raise ValueError(
                f"[make_code_items] a source of {self._ends[-1]:,.0f} tokens is too short for a context of {length:,}."
            )
        for _ in range(_TRIES):
            stop = rng.randrange(first, len(self._lines))
            start, sure = (bisect.bisect_left(self._ends, self._ends[stop] - n) for n in (length, 0.9 * length - _ROOM))
            inside = len(self._encode("\n".join(self._lines[sure:stop])))
            if inside < length - _ROOM and enough(Lines(start, sure, stop)):
                return Lines(start, sure, stop)
        raise ValueError(
            f"[make_code_items] no {length:,} tokens of the source hold enough to ask for. Use longer texts, "
            f"or fewer questions about each ('per_document')."
        )

    def line_at(self, lines: Lines, depth: float) -> int:
        """Return the line in which a share of the tokens of some lines has been read."""
        start, stop = self._ends[lines.start], self._ends[lines.stop]
        return bisect.bisect_left(self._ends, start + depth * (stop - start))

    def cut(self, lines: Lines, marks: Sequence[Mark], room: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Return `room` tokens that end with the last of some lines, and where the marks stand in them.

        The text begins wherever it must, as a window on a file does.
        """
        order = sorted(range(len(marks)), key=lambda i: marks[i].start)
        parts: list[tuple[int | None, Sequence[str]]] = []
        at = lines.start
        for i in order:
            start, stop = marks[i].start, marks[i].stop
            while stop < lines.stop and start < stop and not self._lines[stop]:
                stop += 1
            parts.append((None, self._lines[at:start]))
            parts.append((i, marks[i].lines or self._lines[start:stop]))
            at = stop
        parts.append((None, self._lines[at : lines.stop]))
        # A part ends with line ends, its last empty lines' too: where most tokenizers split.
        texts = [_joined(part) for _, part in parts]
        texts[-1] += "\n"
        encoded = [self._encode(text) for text in texts]
        need, start = room - sum(map(len, encoded[1:])), lines.start
        while len(encoded[0]) < need and start > 0:
            start = max(0, start - 8)
            front = self._lines[start : marks[order[0]].start]
            encoded[0] = self._encode(_joined(front))
        if not 0 < need <= len(encoded[0]):
            raise ValueError(f"[make_code_items] 'length' must leave room for code, but {room} tokens are too few.")
        encoded[0] = encoded[0][-need:]
        spans = [(0, 0)] * len(marks)
        ids: list[int] = []
        for (i, _), tokens in zip(parts, encoded):
            if i is not None:
                spans[i] = (len(ids), len(ids) + len(tokens))
            ids += tokens
        return ids, spans


def _joined(lines: Iterable[str]) -> str:
    return "".join(line + "\n" for line in lines)
