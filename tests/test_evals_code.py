"""Questions about code: what is planted, looked up and written stands in the text, and only once."""

import ast
import random
import re
import zlib
from pathlib import Path

import pytest
from evals_subject import make_subject

from mlx_dsa.evals import code, make_policies
from mlx_dsa.tasks.code_items import (
    FORMS,
    QUESTIONS,
    TASKS,
    CodeSpec,
    FunctionTurn,
    make_code_items,
)
from mlx_dsa.tasks.code_items import _candidates as candidates
from mlx_dsa.tasks.code_items import _chosen as chosen
from mlx_dsa.tasks.code_window import Lines, Window
from mlx_dsa.tasks.needle_items import Turn
from mlx_dsa.tasks.prompts import evened, frame
from mlx_dsa.tasks.source import Source, read_source

FILE = '''"""A file."""
import os

PORT = 8080
MODE = 0o666
JOINED = "wal" "nut"
NAMES = {"first": "walnut", "second": 12}


class Box:
    colour = "crimson"
    shape = "SHAPE"

    def open(self, key, tries=31):
        if key is None:
            raise ValueError(key)
        return self.colour


def close(box):
    """Close it."""
    return box
'''


@pytest.fixture(scope="module")
def subject():
    return make_subject(retention_dim=4, prefill="dense")


@pytest.fixture(scope="module")
def source():
    return read_source()


def test_what_stands_in_a_file_is_found():
    source = Source([("a.py", FILE), ("broken.py", "def (")])
    found = {d.what: d.value for d in source.definitions}
    assert found == {
        "the constant `PORT`": "8080",
        "the entry 'first' of `NAMES`": "walnut",
        "the entry 'second' of `NAMES`": "12",
        "the class attribute `colour`": "crimson",
        "the default of parameter `tries` of function `open`": "31",
    }
    (function,) = source.functions  # the other has a docstring
    assert function.body == ("if key is None:", "raise ValueError(key)")
    assert source.lines[function.start].lstrip().startswith("def open")
    assert source.lines[function.stop - 1].strip() == function.body[1]


def test_who_quotes_the_code_is_right(source):
    """What is written in another way than its value, as MODE and JOINED above, is not asked for."""
    for found in (source, Source([("a.py", FILE)])):
        assert len(found.definitions) >= 5
        for definition in found.definitions:
            quoted = "\n".join(found.lines[definition.start : definition.stop])
            assert Turn([1], (definition.value,)).correct(quoted)


def test_a_gap_takes_a_statement():
    source = Source([("a.py", FILE)])
    assert {g.scope for g in source.gaps} == {"module", "class", "function"}
    for gap in source.gaps:
        lines = [*source.lines[: gap.line], gap.indent + "new = 1", *source.lines[gap.line :]]
        ast.parse("\n".join(lines))
        assert not any(source.lines[gap.line - gap.blank : gap.line])


def test_only_files_that_no_recipe_trains_on_are_read(tmp_path):
    names = [f"module{i}.py" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(FILE)
    held_out = [name for name in names if zlib.crc32(name.encode()) % 4 == 0]
    lines = read_source(tmp_path).lines
    assert [x.removeprefix("# ") for x in lines if x.startswith("# ")] == sorted(held_out)
    assert 0 < len(held_out) < 20
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no source"):
        read_source(tmp_path / "empty")


@pytest.mark.parametrize("phrasing", FORMS)
@pytest.mark.parametrize("task", TASKS)
def test_texts_have_their_length_and_hold_each_answer(subject, source, task, phrasing):
    tokenizer = subject.tokenizer
    spec = CodeSpec(task, phrasing=phrasing, per_document=2)
    length = 4096 if task == "definitions" else 2048
    items = make_code_items(spec, source, tokenizer, [length], [0.3, 0.8], 2)
    assert len(items) == 8
    assert {sum(len(turn.ids) for turn in item.turns) for item in items} == {length}
    away = []
    for item in items:
        text, question = (tokenizer.decode(turn.ids) for turn in item.turns)
        asked = item.turns[1]
        held = tokenizer.decode(item.turns[0].ids[slice(*item.spans[0])])
        assert item.question.split(". ")[0] in question
        if task == "functions":
            body = [line.strip() for line in held.splitlines() if line.strip()]
            assert tuple(body[-2:]) == asked.values and asked.correct(held)
            continue
        (value,) = asked.values
        assert not asked.correct(item.question)  # what is repeated is no answer
        assert value in held and held in text
        assert asked.correct(f"It is {value}.") and not asked.correct("It is 77777.")
        if task == "constants":
            assert not asked.correct(f"It is {value}, not {asked.others[0]}.")
            away.append(abs(item.spans[0][0] / len(item.turns[0].ids) - item.depth))
    assert not away or sum(away) / len(away) < 0.2
    again = make_code_items(spec, source, tokenizer, [length], [0.3, 0.8], 2)
    assert again == items


def test_planted_code_parses(source):
    """Each form, where its scope allows it, leaves a file that Python reads."""
    fields = dict(name="a_b", NAME="A_B", Name="AB", words="a b", key="size", KEY="SIZE", v="7")
    alone = Source([("a.py", FILE)])
    for form in (form for forms in FORMS.values() for form in forms):
        scope, text, what = form
        gap = next(g for g in alone.gaps if g.scope == scope)
        lines = [gap.indent + line for line in text.format(**fields).split("\n")]
        ast.parse("\n".join([*alone.lines[: gap.line], *lines, *alone.lines[gap.line :]]))
        assert what.format(**fields) != what


def recipe_lists():
    """Return the forms of constants and the questions about them in the recipe's code rows."""
    file = Path(__file__).resolve().parents[1] / "weights" / "recipe" / "pretrained" / "code_rows.py"
    lists = {n.targets[0].id: n.value for n in ast.parse(file.read_text()).body if isinstance(n, ast.Assign)}
    forms, asks = (ast.literal_eval(lists[name]) for name in ("FORMS", "ASK"))
    return [text for _, text, _ in forms], asks


def means(text):
    """Return what a form gives a value by: what it calls, and the walrus."""
    return set(re.findall(r":=|\b[a-z]\w*(?=\()", re.sub(r"\{\w+\}", "X", text)))


def plain(question):
    return re.sub(r"\{\w+\}", "X", question)


def test_what_is_held_out_stands_in_no_training_row():
    trained, asked = recipe_lists()
    known = set().union(*map(means, trained))
    assert all(means(text) and not means(text) & known for _, text, _ in FORMS["heldout"])
    assert {plain(q) for q in QUESTIONS["heldout"]}.isdisjoint(map(plain, asked))
    # What training has is found out.
    assert "add_argument" in known and "setdefault" in known
    assert not {plain(q) for q in QUESTIONS["train"]}.isdisjoint(map(plain, asked))


def test_a_function_is_right_if_its_first_lines_follow_one_another():
    turn = FunctionTurn([1], ("if key is None:", "raise ValueError(key)"))
    reply = "```python\ndef open(self, key):\n    if key is None:\n\n        raise ValueError(key)\n```"
    assert turn.correct(reply)
    assert not turn.correct(reply.replace("is None", "== None"))
    assert not turn.correct(reply.replace("    if key is None:\n", "    if key is None:\n    pass\n"))
    assert not turn.correct("if key is None: raise ValueError(key)")


def test_a_result_names_the_code_that_it_is_about(subject):
    policies = make_policies(["dense", "retention"], subject.config)
    options = dict(lengths=[1024], depths=[0.5], limit=1, per_document=2, max_tokens=3, batch_size=2)
    result = code(subject, policies, **options)
    assert result["kind"] == "code" and {"python", "source"} <= set(result["config"])
    assert [row["n"] for row in result["rows"] if row["depth"] is None] == [2, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(task="classes"), "'task' must be one of constants"),
        (dict(setting="two-turns"), "'setting' must be one of"),
        (dict(per_document=0), "'per_document' must be at least 1"),
        (dict(per_document=30, lengths=[3000]), "no room for 30 constants"),
        (dict(lengths=[120]), "no 120 tokens of the source|must leave room"),
    ],
)
def test_what_cannot_be(subject, options, message):
    with pytest.raises(ValueError, match=message):
        code(subject, make_policies(["dense"], subject.config), **{"lengths": [1024], **options})


def test_a_source_that_is_too_short(subject):
    with pytest.raises(ValueError, match="too short for a context of 4,096"):
        make_code_items(CodeSpec(), Source([("a.py", FILE)]), subject.tokenizer, [4096], [0.5], 1)


NESTED = """def first():
    {0} = 1
    def second():
        {0} = 2
        def third():
            {0} = 3
            return {0}
"""


def lines_and_window(source):
    """Return all lines of a source, and a window for which a line is a token."""
    n = len(source.lines)
    return Lines(0, 0, n), Window(source, None, range(n + 1))


def test_what_was_asked_before_does_not_stand_in_the_way():
    """The second function shares lines with both others: after it nothing is left."""
    source = Source([("a.py", NESTED.format("a_name"))])
    first, second, third = source.functions
    spec = CodeSpec("functions", per_document=2)
    where = (spec, source, lines_and_window(source)[1], lines_and_window(source)[0], [0.0, 1.0])
    assert chosen(*where) == [first, third]
    assert chosen(*where, {first, third}) == [first, third]
    assert chosen(*where[:-1], [0.0], {first}) == [second]


def test_what_may_stand_twice_is_not_asked_for():
    """A text may begin some lines before its window."""
    filler = "".join(f"name_{i} = {i}\n" for i in range(100, 140))
    for between, n in (("", 1), (filler, 2)):
        source = Source([("a.py", "PORT = 8080\n" + between + 'PORT = 9090\nHOST = "walnut"\n')])
        stop = len(source.lines)
        found = candidates(CodeSpec("definitions", per_document=1), source, Lines(stop - 2, stop - 2, stop))
        assert [d.value for d in found] == ["9090", "walnut"][-n:]


def test_a_depth_is_the_one_where_the_answer_stands(subject, source):
    depths = [0.1, 0.5, 0.9]
    items = make_code_items(CodeSpec("definitions"), source, subject.tokenizer, [8192], depths, 2)
    moved = 0
    for number, item in enumerate(items):
        at = item.spans[0][0] / len(item.turns[0].ids)
        assert item.depth == min(depths, key=lambda depth: abs(depth - at))
        moved += item.depth != depths[(number // 8 + number % 4) % 3]
    assert moved  # what the code defines does not stand where it is wanted


def test_questions_are_made_equally_long(subject):
    encode = lambda text: list(subject.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    tail = frame(subject.tokenizer).tail
    rng = random.Random(1)
    texts = ["What is it?", "Which number stands in the old ledger?", "Tell me the name of the dog, please."]
    rng.shuffle(texts)
    assert len({len(encode(text + tail)) for text in texts}) > 1
    found = evened(texts, encode, after=tail)
    assert len({len(ids) for ids in found}) == 1
    for text, ids in zip(texts, found):
        said = subject.tokenizer.decode(ids)
        assert said.startswith(text) and said.endswith(tail)
    # What no words can level stays as it is.
    far = ["What?", "What? " * 200]
    assert evened(far, encode) == [encode(text) for text in far]
