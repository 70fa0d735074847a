"""The recipes' modules, which import one another by plain names, and texts to make rows of."""

import contextlib
import gzip
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "weights" / "recipe"
PRETRAINED = RECIPE / "pretrained"
FUNCTION = '''
def {name}_{i}(path, limit={i}, *, {word}="{word}"):
    """Return the {word} of a path as often as it is asked for."""
    for part in path.split("{word}"):
        limit = limit - len(part) * {i}
    return limit + {i}
'''


@contextlib.contextmanager
def recipe_imports(folder):
    """Let the modules of a folder be imported by their plain names, which are gone again afterwards.

    Args:
        folder (Path): `RECIPE` or `PRETRAINED`: both have a `rows`, a `train` and an `export`.
    """
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RECIPE)):
                del sys.modules[name]


def write_sources(folder):
    """Write a book of invented sentences and a folder of Python files; return the paths of both."""
    rng = random.Random(5)
    words = [a + b + c for a in "mo ta ri lu".split() for b in "nar dil sot".split() for c in "a en is".split()]
    lines = []
    for number in range(2500):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(6, 22)))
        lines.append(text.capitalize() + "." + ("\n\n" if number % 7 == 0 else " "))
    with gzip.open(folder / "books.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "".join(lines)}) + "\n")
    code = folder / "code"
    code.mkdir()
    for number in range(24):
        name = rng.choice(words)
        body = "".join(FUNCTION.format(name=name, i=i + 31 * number, word=rng.choice(words)) for i in range(8))
        (code / f"module{number}.py").write_text("import os\n" + body, encoding="utf-8")
    return folder / "books.jsonl.gz", code
