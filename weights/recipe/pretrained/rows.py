"""Write rows to train the indexers and retention heads of a chat model on.

    python weights/recipe/pretrained/rows.py books-train.jsonl.gz OUT.jsonl.gz --tokenizer FOLDER \\
        --lengths '{"4096": 200, "8192": 600}' --seed 1

Each row fills its length, of which 90% at least, as the model's own template renders it. A row is
{"messages": ...} or {"text": ...} with its "length" in tokens, its "kind", and in "values" what
each question's answer must name.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process encodes for itself
sys.path.insert(0, str(Path(__file__).resolve().parent))
import code_rows
import kinds as K
import texts as T

# Shares of the tokens.
SHARES = {"facts": 0.40, "code": 0.16, "sentences": 0.14, "twice": 0.12, "plain": 0.10, "lists": 0.08}
MAKERS = {"facts": K.fact_row, "code": code_rows.code_row, "sentences": K.sentence_row, "twice": K.twice_row,
          "plain": K.plain_row, "lists": K.list_row}  # fmt: skip
_FULL, _TRIES = 0.9, 30


def make_row(maker, kind, length, seed):
    """Return (row, its tokens): one of a kind that fills 90 to 100% of `length` tokens.

    Raises:
        RuntimeError: If none of several tries does.
    """
    spare, size = 0, 0
    for number in range(_TRIES):
        rng = random.Random(f"{seed}/{kind}/{length}/{number}")
        made = MAKERS[kind](rng, length - spare, maker)
        if made is None:
            continue
        said, turns = made if isinstance(made, tuple) else (made, [])
        row = {"text": said} if isinstance(said, str) else {"messages": said}
        row |= {"length": length, "kind": kind}
        if turns:
            row["values"] = [turn[2] for turn in turns]
        size = maker.measure.size(row)
        if _FULL * length <= size <= length:
            return row, size
        spare = max(0, spare + size - length + 16) if size > length else 0
    raise RuntimeError(f"[make_row] no {kind} row of {length} tokens in {_TRIES} tries; the last has {size}.")


def plan(lengths, seed):
    """Return (kind, length) of every row: of each length so many of a kind as its share says, in random order."""
    rng = random.Random(seed)
    rows = []
    for length, count in sorted(lengths.items()):
        start, total = rng.random(), 0.0
        bounds = []
        for kind, share in SHARES.items():
            total += share
            bounds.append((total, kind))
        for i in range(count):
            place = (i + start) / count % 1.0
            rows.append((next((kind for bound, kind in bounds if place < bound), "facts"), length))
    rng.shuffle(rows)
    return rows


def load_maker(books, tokenizer, folders=None):
    """Return a Maker that reads the books and counts with the tokenizer in a folder."""
    from transformers import AutoTokenizer

    measure = T.Measure(AutoTokenizer.from_pretrained(tokenizer))
    library = T.Books(books, measure)
    return K.Maker(measure, library, T.Code(measure, folders), library.pools())


def _work(job):
    (kind, length), seed = job
    row, size = make_row(_work.maker, kind, length, seed)
    return json.dumps(row, ensure_ascii=False), size, kind


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="a model's folder")
    parser.add_argument("--lengths", type=json.loads, required=True, help="JSON: rows of each length in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    lengths = {int(length): count for length, count in args.lengths.items()}
    _work.maker = load_maker(args.books, args.tokenizer)
    jobs = [(what, f"{args.seed}/{i}") for i, what in enumerate(plan(lengths, args.seed))]
    tokens = Counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # the books are there already
    with context.Pool(args.workers) as pool, gzip.open(args.out, "wt", 4, encoding="utf-8") as file:
        for line, size, kind in pool.imap(_work, jobs, chunksize=4):
            file.write(line + "\n")
            tokens[kind] += size
    total = sum(tokens.values())
    shares = ", ".join(f"{kind} {n / total:.1%}" for kind, n in tokens.most_common())
    print(f"{len(jobs)} rows, {total:,} tokens: {shares}")


if __name__ == "__main__":
    main()
