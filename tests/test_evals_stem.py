"""Replies that are begun for the model: with what, at which length, and what is judged of them."""

import json
import random
import sys

import pytest
from click.testing import CliRunner
from evals_subject import make_subject
from local_models import write_indexers, write_model

from mlx_dsa.cli import main
from mlx_dsa.evals import code, make_policies, needle, read_result, read_suite, run_suite
from mlx_dsa.evals.generation import Heard, Reply
from mlx_dsa.evals.report import plots
from mlx_dsa.tasks.code_items import FORMS, TASKS, CodeSpec, make_code_items
from mlx_dsa.tasks.documents import load_documents
from mlx_dsa.tasks.facts import (
    is_correct,
    make_facts,
    make_key_value,
    make_multi_query,
    make_multi_value,
    stem_of,
)
from mlx_dsa.tasks.haystack import Haystack
from mlx_dsa.tasks.needle_items import NeedleSpec, fields_of, make_items
from mlx_dsa.tasks.prompts import CLOSINGS, MORE_CLOSINGS, evened, frame
from mlx_dsa.tasks.source import read_source

asking = sys.modules["mlx_dsa.evals.asking"]
GRID = dict(lengths=[320], depths=[0.5], limit=1)


@pytest.fixture(scope="module")
def subject():
    return make_subject(tied=False, retention_dim=4, prefill="dense")


@pytest.fixture(scope="module")
def haystack(subject):
    return Haystack([load_documents()[0].text[:60_000]], subject.tokenizer)


def encoder(tokenizer):
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def split_off(said, tail):
    """Return what stands before and after the last tail of a turn."""
    before, _, stem = said.rpartition(tail)
    return before, stem


# Stems


@pytest.mark.parametrize("phrasing", ["train", "heldout"])
def test_a_stem_is_the_answer_up_to_its_value(phrasing):
    rng = random.Random(1)
    for _ in range(200):
        (fact,) = make_facts(rng, 1, value="mixed", entities="heldout", phrasing=phrasing)
        assert f"{stem_of(fact)} {fact.value}." == fact.answer
        assert not is_correct(stem_of(fact), fact.value)  # nothing is given away
    values, pair = make_multi_value(rng, 3), make_key_value(rng, 5)
    assert f"{stem_of(values)} {values.short_answer}." == values.answer
    assert f"{stem_of(pair)} {pair.values[0]}." == pair.answer
    assert stem_of(make_multi_query(rng, make_facts(rng, 3))) == ""


@pytest.mark.parametrize("task", ["single", "multi-key", "multi-value", "key-value"])
@pytest.mark.parametrize("setting", ["in-prompt", "before-question", "two-turns"])
def test_every_question_is_followed_by_its_stem(subject, haystack, task, setting):
    if setting == "two-turns" and task != "single":
        return
    tokenizer, tail = subject.tokenizer, frame(subject.tokenizer).tail
    options = dict(task=task, setting=setting, value="mixed")
    plain, items = (
        make_items(NeedleSpec(**options, stem=stem), haystack, tokenizer, [700], [0.2, 0.8], 3)
        for stem in (False, True)
    )
    for item, unbegun in zip(items, plain, strict=True):
        assert (item.key, item.question, item.expected) == (unbegun.key, unbegun.question, unbegun.expected)
        asked = [turn for turn in item.turns if turn.values]
        for turn, other in zip(asked, unbegun.turns[-len(asked) :], strict=True):
            said, stem = split_off(tokenizer.decode(turn.ids), tail)
            assert stem.endswith((" is", " are")) and not turn.correct(stem)
            assert split_off(tokenizer.decode(other.ids), tail)[1] == ""
            about = set(stem.lower().removeprefix("the value of ").split()) - {"the", "of", "for", "is", "are"}
            assert about and all(word.rstrip("s") in said.lower() for word in about)
        assert all(word.rstrip("s") in item.question.lower() for word in about)
        if setting == "in-prompt":
            assert len(item.turns[0].ids) == 700  # the stem is counted


def test_a_second_question_has_the_stem_of_its_own(subject, haystack):
    spec = NeedleSpec(setting="before-question", per_document=4, turns=2, stem=True)
    tail = frame(subject.tokenizer).tail
    for item in make_items(spec, haystack, subject.tokenizer, [700], [0.5], 2):
        first, second = (split_off(subject.tokenizer.decode(t.ids), tail) for t in item.turns[1:])
        assert item.question in second[0] and item.question not in first[0]
        assert first[1] != second[1]


def test_a_begun_reply_has_the_tokens_of_a_whole_one(haystack):
    tokenizer = make_subject().tokenizer
    spec = NeedleSpec(setting="before-question", per_document=2, turns=2, stem=True)
    around, encode = frame(tokenizer), encoder(tokenizer)
    for item in make_items(spec, haystack, tokenizer, [400], [0.4], 3):
        text, first, second = (turn.ids for turn in item.turns)
        said, stem = split_off(tokenizer.decode(text + first), around.tail)
        last, begin = split_off(tokenizer.decode(second), around.tail)
        messages = [
            {"role": "user", "content": said.removeprefix(around.head)},
            {"role": "assistant", "content": f"{stem} 4711."},
            {"role": "user", "content": last.removeprefix(around.again)},
        ]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text + first + encode(" 4711.") + second == encode(whole + begin)


def test_without_a_chat_template_a_blank_is_put_before_the_stem(haystack):
    tokenizer = make_subject().tokenizer
    tokenizer._tokenizer.chat_template = None
    (item,) = make_items(NeedleSpec(stem=True), haystack, tokenizer, [400], [0.4], 1)
    assert "\n\nAnswer: " in tokenizer.decode(item.turns[0].ids)
    (item,) = make_items(NeedleSpec(), haystack, tokenizer, [400], [0.4], 1)
    assert tokenizer.decode(item.turns[0].ids).endswith("\n\nAnswer:")


def test_what_has_several_stems_is_refused():
    with pytest.raises(ValueError, match="'stem' does not go with task 'multi-query'"):
        NeedleSpec(task="multi-query", stem=True)
    assert NeedleSpec(task="multi-query", stem=False)


def test_results_of_before_keep_their_identity():
    for spec in (NeedleSpec, CodeSpec):
        assert "stem" not in fields_of(spec()) and fields_of(spec(stem=True))["stem"] is True
    names = ["task", "setting", "value", "phrasing", "per_document", "seed"]
    assert list(fields_of(CodeSpec())) == names


# Equal lengths


@pytest.mark.parametrize("value", ["digits", "word", "mixed"])
@pytest.mark.parametrize("phrasing", ["train", "heldout"])
def test_begun_questions_are_equally_long_at_every_seed(subject, haystack, value, phrasing):
    tokenizer, around = subject.tokenizer, frame(subject.tokenizer)
    options = dict(setting="before-question", value=value, phrasing=phrasing, per_document=4, turns=2, stem=True)
    uneven = 0
    for seed in range(6):
        spec = NeedleSpec(**options, even=True, seed=seed)
        items = make_items(spec, haystack, tokenizer, [700], [0.1, 0.5, 0.9], 5)
        unlike = make_items(NeedleSpec(**options, seed=seed), haystack, tokenizer, [700], [0.5], 2)
        for turn in (1, 2):
            assert len({len(item.turns[turn].ids) for item in items}) == 1
            uneven += len({len(item.turns[turn].ids) for item in unlike}) > 1
        for item in items:
            said, stem = split_off(tokenizer.decode(item.turns[2].ids), around.tail)
            closing = said.removeprefix(around.again + item.question)
            assert closing != said and stem.endswith(" is")
            for known in MORE_CLOSINGS:
                closing = closing.replace(f" {known}", "")
            assert closing == ""
    assert uneven == 12


def test_each_text_may_have_its_own_end(subject):
    encode = encoder(subject.tokenizer)
    texts, ends = ["What is it?", "Tell me the name of the dog."], ["\nIt is", "\nThe name of the old dog is"]
    found = evened(texts, encode, "\n", ends)
    assert len({len(ids) for ids in found}) == 1
    for text, end, ids in zip(texts, ends, found):
        said = subject.tokenizer.decode(ids)
        assert said.startswith("\n" + text) and said.endswith(end)
    # Without a word to say they stay as they are.
    assert evened(texts, encode, "\n", ends, ()) == [encode(f"\n{t}{e}") for t, e in zip(texts, ends)]
    assert MORE_CLOSINGS[: len(CLOSINGS)] == CLOSINGS


# What is judged


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("turns", [1, 2])
def test_what_follows_the_stem_is_judged(subject, monkeypatch, wrong, turns):
    """Whoever goes on with the value is right, with another fact's wrong, with none too."""
    encode, told = encoder(subject.tokenizer), []

    def converse(model, conversations, **options):
        told.extend(conversations)
        return [Heard([Reply(ids, True) for ids in next(goes_on)]) for _ in conversations]

    options = dict(setting="before-question", per_document=4, turns=turns, stem=True)
    spec = NeedleSpec(**options)
    prose = Haystack([d.text for d in load_documents()], subject.tokenizer)
    items = make_items(spec, prose, subject.tokenizer, [320], [0.5], 1)
    goes_on = iter([[encode(f" {(t.others if wrong else t.values)[0]}.") for t in item.turns[1:]] for item in items])
    monkeypatch.setattr(asking, "converse", converse)
    policies = make_policies(["dense"], subject.config)
    result = needle(subject, policies, **GRID, **options, max_tokens=16)
    assert [item["correct"] for item in result["items"]] == [not wrong] * 4
    assert [[ids for ids, _ in talk] for talk in told] == [[t.ids for t in item.turns] for item in items]
    for item, record in zip(items, result["items"], strict=True):
        assert record["reply"] == ((item.turns[-1].others[0] if wrong else item.expected) + ".")
        assert not item.turns[-1].correct("not known.")


# Code


@pytest.fixture(scope="module")
def source():
    return read_source()


@pytest.mark.parametrize("phrasing", FORMS)
@pytest.mark.parametrize("task", TASKS)
def test_questions_about_code_are_begun(subject, source, task, phrasing):
    tokenizer, tail = subject.tokenizer, frame(subject.tokenizer).tail
    length = 4096 if task == "definitions" else 2048
    options = dict(task=task, phrasing=phrasing, per_document=2)
    plain, items = (
        make_code_items(CodeSpec(**options, stem=stem), source, tokenizer, [length], [0.3, 0.8], 2)
        for stem in (False, True)
    )
    assert len({len(item.turns[1].ids) for item in items}) == 1
    for item, unbegun in zip(items, plain, strict=True):
        assert sum(len(turn.ids) for turn in item.turns) == length
        assert split_off(tokenizer.decode(unbegun.turns[1].ids), tail)[1] == ""
        said, stem = split_off(tokenizer.decode(item.turns[1].ids), tail)
        asked = item.turns[1]
        assert item.question in said and not asked.correct(stem)
        if task == "functions":
            name = stem.removeprefix("```python\ndef ")
            assert f"`{name}`" in item.question
            assert asked.correct("(self, key):\n    " + "\n\n    ".join(asked.values) + "\n```")
            assert not asked.correct("(self, key):\n    " + "\n    pass\n    ".join(asked.values))
        else:
            what = stem.removeprefix("The value of ").removesuffix(" is")
            assert what in item.question and what != stem
            assert asked.correct(f' "{asked.values[0]}".'.strip())


def test_a_result_says_that_its_replies_are_begun(subject):
    policies = make_policies(["dense"], subject.config)
    options = dict(lengths=[1024], depths=[0.5], limit=1, per_document=2, max_tokens=2, batch_size=2)
    assert code(subject, policies, **options, stem=True)["config"]["stem"] is True
    assert "stem" not in code(subject, policies, **options)["config"]


@pytest.mark.parametrize("more, said", [({"stem": True}, ", replies begun"), ({}, "")])
def test_a_picture_says_that_its_replies_are_begun(more, said):
    result = {"kind": "needle", "config": {"task": "single", "setting": "in-prompt", **more}}
    assert plots._about(result) == f"Needle (single, in-prompt{said})"
    assert plots._setting({**result, "rows": [{"length": 512}]}) == f"in-prompt{said}, 512 tokens"


# Commands and suites


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    return ["--model", str(write_model(root / "model")), "--indexer", str(write_indexers(root / "i"))]


@pytest.mark.parametrize("kind, length", [("needle", "256"), ("code", "1024")])
def test_the_commands_begin_replies(model, tmp_path, kind, length):
    hashes = []
    for more in ([], ["--stem"]):
        out = tmp_path / f"{kind}{len(more)}.json"
        options = ["--quick", "--lengths", length, "--max-tokens", "2", "--out", str(out)]
        done = CliRunner().invoke(main, ["eval", kind, *options, *more, *model])
        assert done.exit_code == 0, done.output
        result = read_result(out)
        assert ("stem" in result["config"]) == ("Each reply is begun" in done.output) == bool(more)
        hashes.append([item["hash"] for item in result["items"]])
    assert not set(hashes[0]) & set(hashes[1])


def test_a_command_that_cannot_begin_replies_says_so(model):
    done = CliRunner().invoke(main, ["eval", "needle", "--stem", "--task", "multi-query", *model])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "--stem does not go with task 'multi-query'" in " ".join(done.output.split())


def test_a_suite_begins_replies(subject, tmp_path):
    run = dict(kind="needle", lengths=[256], depths=[0.5], limit=1, max_tokens=2, policies=["dense", "retention"])
    file = tmp_path / "suite.json"
    runs = [{**run, "name": "own"}, {**run, "name": "begun", "stem": True}]
    file.write_text(json.dumps({"runs": runs}))
    results = run_suite(subject, read_suite(file), tmp_path / "out")
    assert [r["config"].get("stem") for r in results.values()] == [None, True]
    _, own, begun = (tmp_path / "out" / "report.md").read_text().split("\n## ")
    assert "reply is begun" in begun and "reply is begun" not in own
    file.write_text(json.dumps({"runs": [{**run, "name": "begun", "stem": "yes"}]}))
    with pytest.raises(ValueError, match="'stem' has a wrong value: 'yes'"):
        read_suite(file)
