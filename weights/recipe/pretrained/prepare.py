"""Turn rows into token arrays: what is learnt from each, and by which queries.

    python weights/recipe/pretrained/prepare.py ROWS.jsonl.gz OUT.npz --model FOLDER

OUT.npz holds, for R rows of N tokens together: tokens [N] uint32, offsets [R + 1] int64, focus [N]
uint8 (1 where a query counts), n_keys [R] int32 (the first keys of a row, those that are learnt
from), kind [R] and length [R].
"""

import argparse
import itertools
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import numpy as np

from mlx_dsa.train.data import Sequence
from mlx_dsa.train.lessons import read_once
from mlx_dsa.train.rendering import render_row
from mlx_dsa.train.sources import read_rows

MIN_DISTANCE = 32  # queries at most so many tokens after a key do not count for it
QUESTION = 32  # tokens before a reply that count, if the turn is longer than a question is
TURN = 160  # tokens of the longest turn that is a question as a whole
BLOCK = 48  # rows that are encoded together


def split_row(tokenizer, row):
    """Return (parts of the rendered text, whether each is a reply).

    The template's own tokens end before a reply and begin after it, so the parts' tokens are the text's.
    """
    if "text" in row:
        half = len(row["text"]) // 2
        return ([row["text"][:half]] * 2 if row["kind"] == "twice" else [row["text"]]), None
    piece = render_row(tokenizer, row)
    parts, marks, at = [], [], 0
    for begin, end in piece.replies:
        parts += [piece.text[at:begin], piece.text[begin:end]]
        marks += [False, True]
        at = end
    return parts + [piece.text[at:]], marks + [False]


def lesson(row, coded, marks):
    """Return (tokens, focus [L] bool, n_keys) of a row whose parts have the tokens `coded`."""
    tokens = np.concatenate([np.array(ids, np.uint32) for ids in coded])[: row["length"]]
    focus = np.zeros(len(tokens), bool)
    starts = np.cumsum([0] + [len(ids) for ids in coded])
    if marks is None:
        half = int(starts[1]) if row["kind"] == "twice" else 0
        if row["kind"] == "twice":
            focus[half:] = True
            return tokens, focus, half
        queries = np.zeros(0, np.int32)
    else:
        for i, is_reply in enumerate(marks):
            if is_reply:
                turn = len(coded[i - 1])
                # The reply and its question; of a turn that holds the document, the last tokens.
                before = turn if turn <= TURN else QUESTION
                focus[starts[i] - before : starts[i + 1]] = True
        if row["kind"] == "twice":
            reply = marks.index(True)
            focus[: starts[reply]] = False
            return tokens, focus, int(starts[reply])
        queries = np.nonzero(focus)[0].astype(np.int32)
    taught = read_once(Sequence(tokens, queries), MIN_DISTANCE)
    focus[:] = False
    focus[taught.queries] = True
    return tokens, focus, taught.n_keys


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    found = []
    rows = read_rows(args.rows)
    while block := list(itertools.islice(rows, BLOCK)):
        split = [split_row(tokenizer, row) for row in block]
        coded = iter(encode([part for parts, _ in split for part in parts], add_special_tokens=False))
        for row, (parts, marks) in zip(block, split):
            ids = [next(coded).ids for _ in parts]
            found.append((*lesson(row, ids, marks), row["kind"], row["length"]))
    tokens, focus, n_keys, kinds, lengths = zip(*found)
    np.savez_compressed(
        args.out,
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0] + [len(t) for t in tokens]).astype(np.int64),
        focus=np.concatenate(focus).astype(np.uint8),
        n_keys=np.array(n_keys, np.int32),
        kind=np.array(kinds),
        length=np.array(lengths, np.int32),
    )
    total = sum(map(len, tokens))
    print(f"{len(tokens)} rows, {total:,} tokens, {sum(int(f.sum()) for f in focus):,} of them queries")
    print(Counter(kinds))


if __name__ == "__main__":
    main()
