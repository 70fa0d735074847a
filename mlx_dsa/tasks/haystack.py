"""Haystacks: real prose of an exact number of tokens, with sentences put at sentence boundaries."""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .documents import load_documents
from .problems import make_problems

# White space after the end of a sentence; a line break stays with the sentence before it and a
# space goes with the one after, as the tokenizers of the Qwen family split.
_BOUNDARY = re.compile(r"(?<=[.!?][\"'”’)])(?=\s)|(?<=[.!?])(?=\s)|(?<=\n)(?=\S)")

# Tokens that the ending of a window may add.
_SLACK = 8


def sentences(text: str) -> list[str]:
    """Split a text into sentences that, joined, give the text again."""
    pieces: list[str] = []
    for piece in _BOUNDARY.split(text):
        stripped = piece.lstrip("\n")
        if pieces and len(stripped) < len(piece):
            pieces[-1] += piece[: len(piece) - len(stripped)]
        if stripped:
            pieces.append(stripped)
    return pieces


@dataclass(frozen=True)
class Placed:
    """A haystack with its needles.

    Args:
        ids (list of int): the tokens, exactly as many as were asked for.
        spans (list of (int, int)): where each inserted text stands, in the order given.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Haystack:
    """Prose as tokens, from which windows of any exact length are cut.

    Args:
        texts (list of str): the prose.
        tokenizer: its `encode(text, add_special_tokens=False)` is used.
        numbers (bool): whether half of the tokens come from word problems, so that digits do not
            stand out. Default: ``False``.
        seed (int): of those problems. Default: ``0``.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, numbers: bool = False, seed: int = 0) -> None:
        self._encode: Callable[[str], list[int]] = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
        pieces = [p for text in texts for p in sentences(text.strip() + "\n\n")]
        if numbers:
            pieces = self._mix(pieces, random.Random(seed))
        self.ids: list[int] = []
        self.breaks: list[int] = []
        self._before: dict[int, str] = {}  # break -> the sentence that ends there
        for previous, piece in zip(["", *pieces], pieces):
            if piece.startswith(" "):
                self.breaks.append(len(self.ids))
                self._before[len(self.ids)] = previous
            self.ids += self._encode(piece)

    def _mix(self, pieces: Iterable[str], rng: random.Random) -> list[str]:
        """Put word problems after each stretch of prose, as many tokens of the one as of the other."""
        mixed, prose, rich = [], 0, 0
        problems = iter(make_problems(rng, 3000, "heldout"))
        for piece in pieces:
            mixed.append(piece)
            prose += len(self._encode(piece))
            if piece.endswith("\n") or prose - rich < 150:
                continue
            while rich < prose:
                problem = next(problems, None)
                if problem is None:
                    return mixed
                text = " " + problem.question + " " + re.sub(r"\s*\n\s*", " ", problem.answer)
                mixed += [" " + p.strip() for p in sentences(text)]
                rich += len(self._encode(text))
        return mixed

    def place(
        self,
        texts: Sequence[str],
        depths: Sequence[float],
        length: int,
        rng: random.Random,
        ending: str = "",
    ) -> Placed:
        """Return a window of `length` tokens with `texts` in it, each at its depth.

        Args:
            texts (list of str): sentences to insert.
            depths (list of float): where: 0 is the start of the window, 1 its end.
            length (int): tokens in all, the inserted ones included.
            rng (random.Random): chooses the window.
            ending (str): what closes the window, such as a blank line; it is encoded together with
                the sentence before it, as in any text. Default: ``""``.

        Raises:
            ValueError: if the texts leave no room, or the haystack is too short.
        """
        inserts = [self._encode(" " + text) for text in texts]
        prose = length - sum(map(len, inserts))
        if prose < 16:
            raise ValueError(
                f"[Haystack] 'length' must leave room for prose: {length} tokens are too few for "
                f"{sum(map(len, inserts))} tokens of facts."
            )
        ends = [b for b in self.breaks if b >= prose + _SLACK]
        if not ends:
            raise ValueError(
                f"[Haystack] a haystack of {len(self.ids):,} tokens is too short for a context of "
                f"{length:,}. Give a longer --haystack FILE."
            )
        end = rng.choice(ends)
        start = end - prose
        breaks = [b - start for b in self.breaks if start + _SLACK < b <= end]
        order = sorted(range(len(texts)), key=lambda i: depths[i])
        ids: list[int] = []
        spans = [(0, 0)] * len(texts)
        done, last = 0, self._before[end]
        for i in order:
            at = max(done, min(breaks, key=lambda b: abs(b - depths[i] * prose)))
            ids += self.ids[start + done : start + at]
            spans[i] = (len(ids), len(ids) + len(inserts[i]))
            ids += inserts[i]
            done = at
            if at == prose:
                last = " " + texts[i]
        ids += self.ids[start + done : end]
        ids[len(ids) - len(self._encode(last)) :] = self._encode(last + ending)
        # The ending may have cost a token: the window starts so much later, or earlier.
        more = length - len(ids)
        assert abs(more) <= _SLACK
        ids = self.ids[start - more : start] + ids if more >= 0 else ids[-more:]
        return Placed(ids, [(a + more, b + more) for a, b in spans])


def read_haystack(source: str | os.PathLike | None, tokenizer: Any, numbers: bool = False, seed: int = 0) -> Haystack:
    """Return a haystack of texts; the bundled books' is kept for the next run.

    Args:
        source (str): as `load_documents` takes it.
        tokenizer, numbers, seed: as in `Haystack`.
    """
    if source is None:
        return _bundled(tokenizer, numbers, numbers and seed)
    return Haystack([d.text for d in load_documents(source)], tokenizer, numbers, seed)


@functools.lru_cache(maxsize=1)
def _bundled(tokenizer: Any, numbers: bool, seed: int) -> Haystack:
    return Haystack([d.text for d in load_documents(None)], tokenizer, numbers, seed)
