"""Collect the words of the training books: values, names and things that no list could hold.

    python weights/recipe/words.py --data /work/shared/data --out .gpu/words.json

A model that meets a few thousand words as values learns that list instead of learning to copy.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tokenizer import books

from mlx_dsa.tasks.problems import held_out_words
from mlx_dsa.tasks.wordlists import PARTS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lower, names, asides = Counter(), Counter(), set()
    for text in books(args.data / "books/books-train.jsonl.gz"):
        lower.update(re.findall(r"(?<=[a-z,] )[a-z]{3,12}(?=[ ,.;])", text))
        names.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,10}(?=[ ,.;])", text))
        asides.update(re.findall(r"(?<=[.!?] )[A-Z][A-Za-z', ]{8,60}[.!?](?= [A-Z])", text))
    held = [word.lower() for words in PARTS["heldout"].values() for word in words]
    held = set(held) | {word.lower() for word in held_out_words()}
    common = {word for word, _ in lower.most_common(250)}
    out = {
        "words": sorted(w for w, n in lower.items() if n >= 4 and w not in held and w not in common),
        "names": sorted(w for w, n in names.items() if n >= 3 and w.lower() not in held and w.lower() not in common),
    }
    out["sentences"] = sorted(asides)[:: max(1, len(asides) // 6000)]
    args.out.write_text(json.dumps(out))
    print({k: (len(v), v[:: len(v) // 12]) for k, v in out.items()})


if __name__ == "__main__":
    main()
