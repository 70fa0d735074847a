"""Text as token sequences, with the places that matter most."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..texts import LONGEST
from .rendering import Piece, render_row
from .report import Report, Unusable
from .sources import read_rows

# Tokens before a reply that count as its question (with the template's own tokens).
_QUESTION_TOKENS = 32
# What is encoded together: so many rows, or so many characters.
_ROW_BLOCK = 64
_TEXT_BLOCK = 4 * LONGEST


class Sequence(NamedTuple):
    """One training sequence.

    Args:
        tokens (np.ndarray): Token ids ``[L]``, int32.
        focus (np.ndarray): Positions ``[F]`` of the replies of a conversation
          and of the tokens just before each, ascending, int32; may be empty.
    """

    tokens: np.ndarray
    focus: np.ndarray


def load_sequences(
    data: str | os.PathLike,
    tokenizer: Any,
    length: int,
    shortest: int,
    limit: int,
    reason: str = "top_k",
    report: Report | None = None,
) -> list[Sequence]:
    """Read a text source and cut it into token sequences.

    What cannot be learnt from is left out, and a warning says in one line how many
    rows that were, why and where. Running text is joined and cut every ``length`` tokens. A conversation is
    kept whole: several are packed into a sequence while they fit, and one that
    is longer than ``length`` loses its beginning. Sequences of ``shortest``
    tokens or fewer are left out, as there is nothing to be learnt from them.

    Args:
        data (str or PathLike): See :func:`~mlx_dsa.train.sources.read_rows`.
        tokenizer: The tokenizer of ``mlx_lm.load``, or a fast one of
          transformers.
        length (int): The most tokens of a sequence.
        shortest (int): What a sequence must exceed.
        limit (int): Reading stops after so many sequences.
        reason (str): The setting that ``shortest`` comes from, for an error.
          Default: ``"top_k"``.
        report (Report, optional): Told what is left out. Default: ``None``.

    Returns:
        list of Sequence: In the order of the source.

    Raises:
        ValueError: If the source cannot be read, holds no text, or no sequence
          is longer than ``shortest``.
    """
    report = report or Report()
    sequences: list[Sequence] = []
    text, chat = _Packer(length, split=True), _Packer(length, split=False)
    for pieces in _blocks(_render(tokenizer, read_rows(data, report), report)):
        for piece, tokens, focus in _encode(tokenizer, pieces):
            (chat if piece.is_chat else text).add(tokens, focus, sequences)
        if len(sequences) >= limit:
            break
    text.flush(sequences)
    chat.flush(sequences)
    longest = max((len(s.tokens) for s in sequences), default=0)
    told = str(report)
    if longest == 0:
        raise ValueError(f"[load_sequences] {data} holds no text. {told}".rstrip())
    if longest <= shortest:
        raise ValueError(
            f"[load_sequences] the sequences must be longer than {reason} = {shortest} "
            f"but the longest in {data} has {longest} tokens. Give longer texts, or a "
            f"smaller {reason.split()[-1]}. {told}".rstrip()
        )
    if told:
        warnings.warn(f"{data}: {told}", stacklevel=2)
    return [s for s in sequences if len(s.tokens) > shortest][:limit]


def fingerprint(sequences: list[Sequence]) -> str:
    """Return a hash of all tokens and focus positions, as a hex string."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for array in sequence:
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.tobytes())
    return digest.hexdigest()


def sample_rows(sequence: Sequence, count: int, top_k: int, focus_share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw query rows that see more than ``top_k`` keys.

    Args:
        sequence (Sequence): Longer than ``top_k``.
        count (int): Rows to draw; a row may come twice where there are few.
        top_k (int): Keys that the indexers are to select.
        focus_share (float): Share of the rows from the focus positions.
        rng (np.random.Generator): The source of chance.

    Returns:
        np.ndarray: Positions ``[count]``, ascending, int32.
    """
    every = np.arange(top_k, len(sequence.tokens))
    focus = sequence.focus[sequence.focus >= top_k]
    n_focus = round(count * focus_share) if len(focus) else 0
    rows = [
        rng.choice(places, n, replace=n > len(places))
        for places, n in ((focus, n_focus), (every, count - n_focus))
        if n
    ]
    return np.sort(np.concatenate(rows)).astype(np.int32)


def pad_batch(sequences: list[Sequence]) -> np.ndarray:
    """Stack token ids as ``[B, L]``, padded on the right, which no earlier row sees."""
    tokens = np.zeros((len(sequences), max(len(s.tokens) for s in sequences)), np.int32)
    for row, sequence in zip(tokens, sequences):
        row[: len(sequence.tokens)] = sequence.tokens
    return tokens


class _Packer:
    """Collect pieces until they fill a sequence; split a piece, or keep it whole."""

    def __init__(self, length: int, split: bool):
        self.length, self.split = length, split
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []
        self.size = 0

    def add(self, tokens: np.ndarray, focus: np.ndarray, out: list[Sequence]):
        if not self.split:
            lost = max(0, len(tokens) - self.length)
            tokens, focus = tokens[lost:], focus[focus >= lost] - lost
            if self.size + len(tokens) > self.length:
                self.flush(out)
        while len(tokens):
            room = self.length - self.size
            self.pieces.append((tokens[:room], focus + self.size))
            self.size += len(tokens[:room])
            tokens = tokens[room:]
            if self.size == self.length:
                self.flush(out)

    def flush(self, out: list[Sequence]):
        if self.size:
            tokens, focus = map(np.concatenate, zip(*self.pieces))
            out.append(Sequence(tokens, focus.astype(np.int32)))
        self.pieces, self.size = [], 0


def _render(tokenizer: Any, rows: Iterator[dict], report: Report) -> Iterator[Piece]:
    """Render rows one by one; the report says of which nothing is learnt."""
    for row in rows:
        try:
            piece = render_row(tokenizer, row)
        except Unusable as reason:
            report.leave_out(reason.kind, reason.detail)
            continue
        if piece.is_chat:
            if not piece.replies:
                report.learn_without_replies()
            yield piece
        else:
            for at in range(0, len(piece.text), LONGEST):
                yield piece._replace(text=piece.text[at : at + LONGEST])


def _blocks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    block, size = [], 0
    for piece in pieces:
        block.append(piece)
        size += len(piece.text)
        if len(block) == _ROW_BLOCK or size >= _TEXT_BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encode(tokenizer: Any, pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray, np.ndarray]]:
    """Encode pieces together, which uses every core; yield tokens and focus positions."""
    if isinstance(tokenizer, TokenizerWrapper):
        tokenizer = tokenizer._tokenizer  # the wrapper itself gives no offsets
    encoded = tokenizer(
        [piece.text for piece in pieces],
        add_special_tokens=False,
        return_offsets_mapping=any(piece.replies for piece in pieces),
        verbose=False,
    )
    for i, piece in enumerate(pieces):
        tokens = np.array(encoded["input_ids"][i], np.int32)
        marked = np.zeros(len(tokens), bool)
        if piece.replies:
            starts, ends = np.array(encoded["offset_mapping"][i]).reshape(-1, 2).T
            for begin, end in piece.replies:
                (inside,) = np.nonzero((ends > begin) & (starts < end))
                if len(inside):
                    marked[max(0, inside[0] - _QUESTION_TOKENS) : inside[-1] + 1] = True
        yield piece, tokens, np.nonzero(marked)[0]
