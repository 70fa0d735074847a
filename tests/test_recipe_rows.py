"""Rows to train pretrained chat models on: they fit, their answers stand in them, nothing held out comes."""

import gzip
import json
import random
import sys
import zlib

import numpy as np
import pytest
from builders import bundled_tokenizer
from recipe_modules import PRETRAINED, ROOT, recipe_imports, write_sources

from mlx_dsa.train.data import load_sequences

TINY = ROOT / "weights" / "tiny"
MARKERS = ("scribbled", "next to", "confirmed", "regarding", "remind", "my friend", "someone asked", "anyone asks")


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules."""
    with recipe_imports(PRETRAINED):
        import prepare
        import rows

        yield rows, prepare


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A book of invented sentences, and a folder of Python files."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def maker(recipe, sources):
    return recipe[0].load_maker(sources[0], TINY, [sources[1]])


@pytest.fixture(scope="module")
def made(recipe, maker):
    """Two rows of each kind."""
    return [recipe[0].make_row(maker, kind, 2048, f"{i}")[0] for kind in recipe[0].SHARES for i in range(2)]


def document(row):
    return max((m["content"] for m in row["messages"] if m["role"] == "user"), key=len)


def unanswered(rows):
    """Return the answers that do not stand in their row's document."""
    return [
        value
        for row in rows
        for values in row.get("values", ())
        for value in values
        if value.lower() not in document(row).lower()
    ]


def test_rows_fill_their_length(made):
    tokenizer = bundled_tokenizer()
    for row in made:
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        size = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert 0.9 * row["length"] <= size <= row["length"], row["kind"]


def test_answers_stand_in_the_text(made):
    asked = {row["kind"] for row in made if "values" in row}
    assert asked == {"facts", "code", "sentences", "lists"} and not unanswered(made)
    for row in made:
        replies = [m["content"] for m in row.get("messages", ()) if m["role"] == "assistant"]
        for values, reply in zip(row.get("values", ())[::-1], replies[::-1]):
            assert all(v.lower() in reply.lower() for v in values), (row["kind"], values, reply)
    swapped = [{**row, "values": [["no such answer"]]} for row in made if "values" in row]
    assert len(unanswered(swapped)) == len(swapped)


def test_a_row_for_the_second_reading_is_one_text_twice(made):
    for row in (row for row in made if row["kind"] == "twice"):
        if "text" in row:
            half = len(row["text"]) // 2
            assert row["text"][:half] == row["text"][half:]
        else:
            user, reply = (m["content"] for m in row["messages"])
            assert reply in user


def test_corrected_facts_are_told_in_their_order(recipe, maker):
    """Whoever asks gets the newest value, so the old one has to stand before it."""
    R, V = sys.modules["facts_rows"], sys.modules["values"]
    rng = random.Random(1)
    fact = R.make_facts(rng, 1, V.Pools())[0]
    newer, text = R.correct(rng, fact, V.Pools())
    assert newer.value == fact.value in text and newer.old != newer.value


def test_facts_have_nothing_held_out(recipe):
    R, V = sys.modules["facts_rows"], sys.modules["values"]
    rng = random.Random(2)
    facts = R.make_facts(rng, 400, V.Pools())
    assert not [f for f in facts if any(map(V.held_out, (f.entity, f.attribute, f.value)))]
    assert {f.kind for f in facts} == set(V.KINDS)
    held = V.F.make_facts(rng, 50, value="word", entities="heldout")
    assert all(V.held_out(f.entity) for f in held) and all(V.held_out(f.value) for f in held)


def test_wordings_are_none_that_are_held_out(recipe):
    V = sys.modules["values"]
    own = [
        template
        for module in (sys.modules["wordings"], sys.modules["questions"])
        for name, templates in vars(module).items()
        if name.isupper()
        for template in templates
    ]
    held = V.w.SENTENCES["heldout"] + V.w.QUESTIONS["heldout"]
    assert len(own) > 250 and not set(own) & set(held)
    assert not [t for t in own if any(mark in t.lower() for mark in MARKERS)]
    assert [t for t in held if any(mark in t.lower() for mark in MARKERS)]  # the marks do mark


def test_wordings_name_what_they_are_about(recipe):
    W, Q = sys.modules["wordings"], sys.modules["questions"]

    def tells(template, value):
        named = "{np}" in template.lower() or ("{a}" in template.lower() and "{e}" in template.lower())
        return named and ("{v}" in template.lower()) == value

    assert all(tells(t, True) for t in W.STATED + W.BLOCKS + W.CLAUSES + W.NEWER)
    assert all(tells(t, False) for t in Q.QUESTIONS + Q.ASK_NEWEST)
    assert not tells("What is the {a}?", False) and not tells("{NP} is known.", True)


def test_code_that_is_held_out_is_never_read(recipe, sources, maker):
    names = {path.name for path in sources[1].glob("*.py")}
    held = {name for name in names if zlib.crc32(name.encode()) % 4 == 0}
    assert held and held != names
    seen = {name for files in maker.code.files.values() for _, name in files}
    assert seen == names - held
    drawn = {maker.code.draw(random.Random(i))[0] for i in range(60)}
    assert drawn and not drawn & held


def test_a_copy_of_held_out_code_is_not_read(recipe, sources, maker, tmp_path):
    T = sys.modules["texts"]
    held = next(p for p in sorted(sources[1].glob("*.py")) if T.is_held_out(p.name))
    free = next(n for n in (f"copy{i}.py" for i in range(9)) if not T.is_held_out(n))
    other = next(n for n in (f"other{i}.py" for i in range(9)) if not T.is_held_out(n))
    text = held.read_text(encoding="utf-8")
    changed = text.replace("_", "_x").replace("path", "way").replace("limit", "rest")
    for folder, name, content in (("a", held.name, text), ("b", free, text), ("b", other, changed)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(content, encoding="utf-8")
    code = T.Code(maker.measure, [tmp_path / "a", tmp_path / "b"])
    assert {name for files in code.files.values() for _, name in files} == {free, other}
    assert {code.draw(random.Random(i))[0] for i in range(20)} == {other}


def test_a_seed_gives_its_rows(recipe, maker):
    make = recipe[0].make_row
    for kind in recipe[0].SHARES:
        assert make(maker, kind, 1024, "a") == make(maker, kind, 1024, "a")
        assert make(maker, kind, 1024, "a") != make(maker, kind, 1024, "b")


def test_the_plan_keeps_the_shares(recipe):
    rows = recipe[0]
    planned = rows.plan({1000: 200, 2000: 100}, 3)
    assert len(planned) == 300
    for length, count in ((1000, 200), (2000, 100)):
        for kind, share in rows.SHARES.items():
            assert abs(planned.count((kind, length)) - share * count) <= 1


def test_prepared_tokens_are_those_of_the_rows(recipe, made, tmp_path, monkeypatch):
    path, out = tmp_path / "rows.jsonl.gz", tmp_path / "rows.npz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(path), str(out), "--model", str(TINY)])
    recipe[1].main()
    arrays, tokenizer = np.load(out), bundled_tokenizer()
    assert len(arrays["kind"]) == len(made) == len(arrays["offsets"]) - 1
    for i, row in enumerate(made):
        part = slice(*arrays["offsets"][i : i + 2])
        tokens, focus, n_keys = arrays["tokens"][part], arrays["focus"][part], arrays["n_keys"][i]
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        if not (row["kind"] == "twice" and "text" in row):  # its halves are encoded one by one
            assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert 0 < n_keys < len(tokens) and focus.any()
        if row["kind"] == "twice":
            assert not focus[:n_keys].any() and focus[n_keys:].any()
        if row["kind"] == "twice" and "text" in row:
            assert (tokens[:n_keys] == tokens[n_keys:]).all()
        if "values" in row:  # each last reply is of queries, and of the document most is not
            end = tokenizer.decode(tokens[focus.astype(bool)].tolist())
            assert row["messages"][-1]["content"] in end
            assert focus.mean() < 0.6 and "text" not in row


def test_mlx_dsa_train_reads_the_rows(made, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    sequences = load_sequences(path, bundled_tokenizer(), 2048, 64, 100)
    chats = [s for s in sequences if len(s.focus)]
    assert len(chats) == sum("messages" in row for row in made)
