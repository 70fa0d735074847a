"""Questions for probe.py: texts with four facts each, as `mlx-dsa eval needle` makes them, as tokens.

    python needles.py MODEL OUT.json --length 8192 --phrasing heldout --limit 5 --seed 101

The seed differs from that of eval/real.json, so that what is chosen by these is not judged by them.
"""

import argparse
import json
from pathlib import Path

import mlx_dsa  # noqa: F401  before MLX, for OpenBLAS

# isort: split
from mlx_lm.utils import load_tokenizer

from mlx_dsa.tasks.documents import load_documents
from mlx_dsa.tasks.haystack import Haystack
from mlx_dsa.tasks.needle_items import NeedleSpec, make_items


def write(model, out, length, phrasing, value, limit, seed):
    """Write a list of texts, each with its tokens and its questions: tokens and value."""
    tokenizer = load_tokenizer(Path(model))
    spec = NeedleSpec("single", "before-question", value, phrasing, per_document=4, seed=seed)
    prose = Haystack([d.text for d in load_documents(None)], tokenizer, False, seed)
    texts = {}
    for item in make_items(spec, prose, tokenizer, [length], [0.1, 0.3, 0.5, 0.7, 0.9], limit):
        text, question = (turn.ids for turn in item.turns)
        texts.setdefault(tuple(text), []).append({"ids": question, "values": item.turns[1].values, "spans": item.spans})
    found = [{"ids": list(text), "questions": questions} for text, questions in texts.items()]
    stop = sorted(tokenizer.eos_token_ids)
    Path(out).write_text(json.dumps({"stop": stop, "length": length, "phrasing": phrasing, "texts": found}))
    print(len(found), "texts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--phrasing", default="train")
    parser.add_argument("--value", default="mixed")
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--seed", type=int, default=101)
    args = parser.parse_args()
    write(args.model, args.out, args.length, args.phrasing, args.value, args.limit, args.seed)
