"""Every script of the recipes starts, and what it makes of a seed stays the same.

Another hash means other data to train on than the READMEs tell of.
"""

import copy
import hashlib
import importlib
import json
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from recipe_modules import PRETRAINED, RECIPE, ROOT, recipe_imports, write_sources

from mlx_dsa.tasks import wordlists
from mlx_dsa.tasks.documents import BOOKS
from mlx_dsa.tasks.problems import make_problem

TINY = ROOT / "weights" / "tiny"
FILES = sorted(RECIPE.rglob("*.py"))
SCRIPTS = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]
NEED_TORCH = {"train", "evaluate", "model", "optim", "probe", "ask", "teacher", "targets", "heads"}
# What evaluate.py fixes of a case.
CASES = [
    {"task": "single", "numbers": 0.0, "style": "after", "facts": 4, "turns": 1, "value": "digits"},
    {"task": "single", "numbers": 0.5, "style": "turn", "facts": 4, "turns": 2, "value": "word"},
    {"task": "single", "numbers": 0.0, "style": "after", "facts": 1, "turns": 1, "value": "mixed",
     "phrasing": "heldout"},
    {"task": "values", "numbers": 0.0, "style": "before", "facts": 2, "turns": 1, "value": "digits"},
    {"task": "query", "numbers": 0.0, "style": "after", "facts": 4, "turns": 1, "value": "digits"},
    {"task": "key_value", "numbers": 0.0, "style": "after", "facts": 24, "value": "mixed"},
]  # fmt: skip


def name_of(path):
    return str(path.relative_to(RECIPE))


def skip_without_torch(path):
    if path.stem in NEED_TORCH:
        pytest.importorskip("torch")


@pytest.mark.parametrize("path", [path for path in FILES if path not in SCRIPTS], ids=name_of)
def test_a_module_is_imported(path):
    skip_without_torch(path)
    with recipe_imports(path.parent):
        assert Path(importlib.import_module(path.stem).__file__) == path


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_tells_how_it_is_called(path, monkeypatch, capsys):
    skip_without_torch(path)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with recipe_imports(path.parent), pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {path.name} ")


def lists():
    return copy.deepcopy({name: value for name, value in vars(wordlists).items() if name.isupper()})


def test_recipes_leave_the_lists_of_the_package_alone():
    before = lists()
    for folder in (RECIPE, PRETRAINED):
        with recipe_imports(folder):
            for path in (p for p in FILES if p.parent == folder and p.stem not in NEED_TORCH):
                importlib.import_module(path.stem)
            # Nor have they lists that are the package's, loaded by another name.
            files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
            assert files.count(wordlists.__file__) == 1
            chats = sys.modules["chats"]
            assert len(chats.SENTENCES) > 2 * len(wordlists.SENTENCES["train"])
            assert len(chats.QUESTIONS) > 2 * len(wordlists.QUESTIONS["train"])
    assert lists() == before


def digest(made):
    """Return a hash of what a maker made; arrays count by their numbers."""
    text = json.dumps(made, ensure_ascii=False, default=lambda x: x.tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What words.py writes of the bundled books."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "books").mkdir()
    shutil.copyfile(BOOKS, folder / "books" / "books-train.jsonl.gz")
    argv = ["words.py", "--data", str(folder), "--out", str(folder / "words.json")]
    with recipe_imports(RECIPE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        importlib.import_module("words").main()
    return folder / "words.json"


def pools_of(words):
    return json.loads(words.read_text(encoding="utf-8"))


def pools_without_sentences(words):
    """Return what distil.py leaves of them."""
    return {name: pool for name, pool in pools_of(words).items() if name != "sentences"}


def corpus():
    """Return a Corpus as train.py has one, of the beginnings of the bundled books."""
    import tokenizer
    from corpus import Corpus
    from tokenizers import Tokenizer

    def problem(rng):
        made = make_problem(rng)
        return f"{made.question}\n{made.answer}"

    coder, rng = Tokenizer.from_file(str(TINY / "tokenizer.json")), random.Random(3)
    end = coder.token_to_id("<|endoftext|>")
    books = [text[20_000:120_000] for text in tokenizer.books(BOOKS)]
    coded = [
        np.array([i for text in texts for i in [*coder.encode(text.strip()).ids, end]], np.uint16)
        for texts in (books, [problem(rng) for _ in range(40)])
    ]
    return Corpus(TINY / "tokenizer.json", *coded, problem)


def made_by_words(words, folder):
    return pools_of(words)


def made_by_frames(words, folder):
    return importlib.import_module("frames").compose()


def made_by_rows(words, folder):
    rows = importlib.import_module("rows").Rows(corpus(), pools=pools_of(words))
    return rows.batch(random.Random(1), 1024, 8 * 1024)


def made_by_rows_for_evaluate(words, folder):
    rows = importlib.import_module("rows").Rows(corpus(), split="heldout")
    return [rows.needle(random.Random(f"case-{i}"), 1500, spec) for i, spec in enumerate(CASES)]


def made_by_problem_chats(words, folder):
    C, rng = importlib.import_module("chats"), random.Random(4)
    return [(C.problem_chats(rng), C.small_talk(rng)) for _ in range(5)]


def made_by_distil(words, folder):
    D = importlib.import_module("distil")
    books = D.Books(BOOKS, D.Tokenizer.from_file(str(TINY / "tokenizer.json")))
    pools = pools_without_sentences(words)
    talks = [D.conversation(random.Random(i), books, pools, 1500, i == 3) for i in range(4)]
    return [talks, D.sequence_rows(random.Random(1), books, pools), D.problems(random.Random(2))]


def made_by_retention(words, folder):
    R = importlib.import_module("retention")
    books = R.D.Books(BOOKS, R.Tokenizer.from_file(str(TINY / "tokenizer.json")))
    return [R.sequence_rows(random.Random(i), books) for i in range(4)]


def made_by_pretrained_rows(words, folder):
    R = importlib.import_module("rows")
    maker = R.load_maker(BOOKS, TINY, [write_sources(folder)[1]])
    return [R.make_row(maker, kind, 2048, f"{i}") for kind in R.SHARES for i in range(2)]


def made_by_needles(words, folder):
    out = folder / "needles.json"
    importlib.import_module("needles").write(str(TINY), out, 700, "train", "mixed", 1, 101)
    return json.loads(out.read_text(encoding="utf-8"))


BUNDLED = {
    made_by_words: "74e8b93b171268c2",
    made_by_frames: "927fa5baa48d613a",
    made_by_rows: "552f906bbbcb2701",
    made_by_rows_for_evaluate: "d37d9c16815bc42b",
    made_by_problem_chats: "8724b59506081c04",
    made_by_distil: "8e370ad30274289e",
    made_by_retention: "23c61b4e62f348e3",
}
FOR_PRETRAINED = {made_by_pretrained_rows: "0ae2c8d719297b54", made_by_needles: "e042250f7206cc61"}


@pytest.mark.parametrize("make", [*BUNDLED, *FOR_PRETRAINED], ids=lambda make: make.__name__[8:])
def test_a_seed_gives_the_rows_that_it_gave(make, words, tmp_path):
    with recipe_imports(RECIPE if make in BUNDLED else PRETRAINED):
        made = make(words, tmp_path)
    assert digest(made) == (BUNDLED | FOR_PRETRAINED)[make]
