"""Haystacks, needles and prompts: exact lengths, right places, fair questions."""

import random
from collections import Counter

import pytest
from evals_subject import make_subject

from mlx_dsa.tasks import wordlists
from mlx_dsa.tasks.documents import load_documents
from mlx_dsa.tasks.facts import make_facts
from mlx_dsa.tasks.haystack import Haystack, sentences
from mlx_dsa.tasks.needle_items import SETTINGS, TASKS, NeedleSpec, Turn, make_items
from mlx_dsa.tasks.prompts import frame


@pytest.fixture(scope="module")
def tokenizer():
    return make_subject().tokenizer


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack([load_documents()[0].text[:60_000]], tokenizer)


def test_bundled_books_are_named():
    assert [d.name for d in load_documents()] == ["Cabin Fever", "The Valley of Fear"]


def test_sentences_joined_give_the_text_and_its_tokens(tokenizer, haystack):
    text = load_documents()[0].text[:60_000].strip() + "\n\n"
    assert "".join(sentences(text)) == text
    assert haystack.ids == list(tokenizer.encode(text, add_special_tokens=False))


def test_needles_stand_at_sentence_boundaries_near_their_depths(tokenizer, haystack):
    texts = ["The code of Ada is 4711.", "The code of Ben is 815."]
    placed = haystack.place(texts, [0.75, 0.25], 900, random.Random(3))
    assert len(placed.ids) == 900
    for text, (start, stop), depth in zip(texts, placed.spans, (0.75, 0.25)):
        assert tokenizer.decode(placed.ids[start:stop]) == " " + text
        assert tokenizer.decode(placed.ids[:start]).rstrip("\"'”’)")[-1] in ".!?"
        assert abs(start / 900 - depth) < 0.1


def test_half_of_a_number_rich_haystack_is_problems(tokenizer):
    text = load_documents()[0].text[:60_000]
    prose, rich = Haystack([text], tokenizer), Haystack([text], tokenizer, numbers=True)

    def digits(haystack):
        return sum(c.isdigit() for c in tokenizer.decode(haystack.ids)) / len(haystack.ids)

    assert digits(prose) < 0.01 < 0.1 < digits(rich)
    assert 1.7 < len(rich.ids) / len(prose.ids) < 2.3


@pytest.mark.parametrize("length, message", [(20, "leave room for prose"), (10**6, "too short for a context")])
def test_lengths_that_cannot_be(haystack, length, message):
    with pytest.raises(ValueError, match=message):
        haystack.place(["The code of Ada is 4711."], [0.5], length, random.Random(0))


@pytest.mark.parametrize("value", ["digits", "word", "mixed"])
def test_facts_in_templates_of_ones_own(value):
    own = ["{NP} equals {v}!"], ["{np} - which is it?"]
    facts = make_facts(random.Random(0), 8, value=value, templates=own)
    assert all(fact.sentence.endswith(f" equals {fact.value}!") for fact in facts)
    assert {fact.question.split(" - ")[1] for fact in facts} == {"which is it?"}
    # Chance is used as it is for the built-in ones.
    listed = wordlists.SENTENCES["train"], wordlists.QUESTIONS["train"]
    built_in = make_facts(random.Random(0), 8, value=value)
    assert make_facts(random.Random(0), 8, value=value, templates=listed) == built_in != facts


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("value", ["digits", "word"])
def test_items(task, setting, value, tokenizer, haystack):
    if setting == "two-turns" and task != "single":
        with pytest.raises(ValueError, match="goes with task 'single' only"):
            NeedleSpec(task=task, setting=setting)
        return
    spec = NeedleSpec(task=task, setting=setting, value=value)
    items = make_items(spec, haystack, tokenizer, [700, 1000], [0.0, 1.0], 2)
    assert len({item.key for item in items}) == 8
    again = make_items(spec, haystack, tokenizer, [700, 1000], [0.0, 1.0], 2)
    assert [i.turns for i in items] == [i.turns for i in again]
    for item in items:
        prompt = item.turns[:2] if setting == "before-question" else item.turns[:1]
        total = sum(len(turn.ids) for turn in prompt)
        assert total == item.length or setting == "before-question" and total < item.length
        asked = item.turns[-1]
        document = item.turns[0].ids
        # The tokens are those of the text as a whole, but for the window's first word.
        ids = [i for turn in prompt for i in turn.ids]
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)[8:] == ids[8:]
        hidden = " ".join(tokenizer.decode(document[a:b]) for a, b in item.spans)
        assert all(v.lower() in hidden.lower() for v in asked.values)
        shown = [tokenizer.decode(document[a:b]).lower() for a, b in item.values]
        assert all(any(v.lower() in s for s in shown) for v in asked.values)
        # The question does not give the answer away.
        assert value == "word" or not any(v in item.question for v in asked.values)
    if setting == "before-question":
        assert len({(item.length, len(item.turns[0].ids)) for item in items}) == 2
        totals = [sum(len(t.ids) for t in item.turns) for item in items]
        assert max(totals[:4]) == 700 or max(totals[4:]) == 1000


@pytest.mark.parametrize("setting", ["before-question", "in-prompt"])
def test_several_questions_about_one_text(setting, tokenizer, haystack):
    spec = NeedleSpec(setting=setting, per_document=4)
    items = make_items(spec, haystack, tokenizer, [700], [0.1, 0.5, 0.9], 2)
    assert len({item.key for item in items}) == 24
    assert Counter(item.depth for item in items) == {0.1: 8, 0.5: 8, 0.9: 8}
    for four in (items[i : i + 4] for i in range(0, 24, 4)):
        assert len({tuple(item.turns[0].ids) for item in four}) == 1
        assert len({item.question for item in four}) == 4
        assert all(item.turns[0].opening == (setting == "in-prompt") for item in four)
        for item in four:
            assert abs(item.spans[0][0] / 700 - item.depth) < 0.15
    assert len({len(item.turns[0].ids) for item in items}) == 1
    assert max(sum(len(t.ids) for t in item.turns) for item in items) == 700
    for wrong in ({"setting": "two-turns"}, {"distractors": 2}, {"task": "multi-key"}):
        with pytest.raises(ValueError, match="'per_document' needs setting"):
            NeedleSpec(**{"setting": setting, "per_document": 4, **wrong})


def test_several_questions_in_one_conversation(tokenizer, haystack):
    spec = NeedleSpec(setting="before-question", per_document=4, turns=2)
    items = make_items(spec, haystack, tokenizer, [700], [0.5], 2)
    for four in (items[:4], items[4:]):
        assert len({tuple(item.turns[0].ids) for item in four}) == 1
        judged = [item.turns[2].values for item in four]
        assert len(set(judged)) == 4
        assert [item.turns[1].values for item in four] == judged[1:] + judged[:1]
    for wrong in ({"setting": "two-turns"}, {"turns": 5}, {"turns": 0}, {"task": "multi-key"}):
        with pytest.raises(ValueError, match="'turns' needs setting"):
            NeedleSpec(**{"setting": "before-question", "turns": 2, **wrong})


def test_an_answer_that_names_everything_is_wrong():
    turn = Turn([], ("4711",), ("815",))
    assert turn.correct("It is 4711.")
    assert not turn.correct("It is 4711 or 815.")
    assert not turn.correct("It is 47112.")
    assert not turn.correct("")
    # "peach" is another fact's value, but also a part of this one's.
    assert Turn([], ("peach prairie",), ("peach",)).correct("It is peach prairie.")


def test_the_second_question_is_about_what_the_first_did_not_ask(tokenizer, haystack):
    for item in make_items(NeedleSpec(setting="two-turns"), haystack, tokenizer, [700], [0.5], 6):
        first, second = item.turns
        assert first.values != second.values
        assert second.values[0] in first.others


def test_frames_come_from_the_chat_template(tokenizer):
    around = frame(tokenizer)
    assert around.head == "<|im_start|>user\n"
    assert around.tail == "<|im_end|>\n<|im_start|>assistant\n"
    assert around.again == "<|im_end|>\n<|im_start|>user\n"


# A template with a system prompt of its own where none is given, as Qwen2.5's and SmolLM2's, which
# say it before the loop and inside it.
BEFORE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSIDE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nHelp, and be brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("template", [BEFORE, INSIDE], ids=["before", "inside"])
def test_a_conversation_has_the_tokens_that_the_chat_template_gives(haystack, template, even):
    tokenizer = make_subject().tokenizer
    tokenizer._tokenizer.chat_template = template
    spec = NeedleSpec(setting="before-question", per_document=2, turns=2, even=even)
    for item in make_items(spec, haystack, tokenizer, [400], [0.4], 3):
        reply = list(tokenizer.encode("It is 4711.", add_special_tokens=False))
        text, first, second = (turn.ids for turn in item.turns)
        around = frame(tokenizer)
        said = tokenizer.decode(text + first).removeprefix(around.head).removesuffix(around.tail)
        last = tokenizer.decode(second).removeprefix(around.again).removesuffix(around.tail)
        messages = [
            {"role": "user", "content": said},
            {"role": "assistant", "content": "It is 4711."},
            {"role": "user", "content": last},
        ]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert "Help" in whole and last.startswith(item.question)
        assert text + first + reply + second == tokenizer.encode(whole, add_special_tokens=False)


def test_hub_data_sets_by_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, part, split, streaming):
        asked.append((name, part, split, streaming))
        return [{"text": f"text {i}. "} for i in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d.text for d in load_documents("c4", limit=2)] == ["text 0. ", "text 1. "]
    assert load_documents("wikitext2")[0].text == "text 0. text 1. text 2. text 3. text 4. "
    assert asked == [
        ("allenai/c4", "en", "validation", True),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
    ]


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def load_dataset(*given, **named):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'c4' is neither|nor to be had from the hub: no network$"):
        load_documents("c4")


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text('{"text": "Two.", "title": "B"}\n\n{"text": "Three."}\n')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert [(d.name, d.text) for d in load_documents(str(tmp_path))] == [
        ("a.txt", "One."),
        ("B", "Two."),
        ("b.jsonl:3", "Three."),
    ]
