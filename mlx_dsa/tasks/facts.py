"""Facts to hide in a text, and the questions about them.

The recipes under weights/recipe draw from here too: training and evaluation have one source. Names, objects, words and
phrasings are split: what `entities="heldout"` or `phrasing="heldout"` yields, no training saw. Tasks beyond the
single fact follow RULER [1].

[1] Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import wordlists as w
from .wordlists import PARTS

_Words = Sequence[str] | None
_Templates = tuple[Sequence[str], Sequence[str]]
VALUES = ("digits", "word", "mixed")  # what a fact tells


@dataclass(frozen=True)
class Fact:
    """One sentence to hide, and one question about it.

    Args:
        key: what the question names, such as "the access code of Ada Thorne".
        value: what must stand in a right answer.
        kind: "digits" or "word".
        sentence: the sentence to put into the text.
        question: the question, without any document.
        answer: a full sentence that restates the question's stem.
        short_answer: the value alone.
        template: id of the sentence and question templates, such as "s3:of/q11:of".
        entity, attribute: the two parts of the key.
    """

    key: str
    value: str
    kind: str
    sentence: str
    question: str
    answer: str
    short_answer: str
    template: str
    entity: str = ""
    attribute: str = ""


@dataclass(frozen=True)
class Task:
    """Several sentences to hide, one question, and every value that a right answer must name."""

    sentences: tuple[str, ...]
    values: tuple[str, ...]
    question: str
    answer: str
    short_answer: str
    template: str
    kind: str = "digits"


def stem_of(asked: Fact | Task) -> str:
    """Return the answer of a Fact or Task up to its values: "The access code of Ada Thorne is"."""
    return asked.answer[: max(0, asked.answer.rfind(asked.short_answer))].rstrip()


def made_up(rng: Random, low: int = 2, high: int = 4) -> str:
    """Return a word of random syllables (training only: it teaches copying, not names)."""
    return "".join(rng.choice(w.SYLLABLES) for _ in range(rng.randint(low, high)))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def make_entity(rng: Random, split: str = "train", names: _Words = None, words: _Words = None) -> str:
    """Return a random person, place, object or code name, as it stands inside a sentence.

    Args:
        rng (random.Random), split (str): as in `make_facts`.
        names, words (list of str): more names, and more words for objects. Default: ``None``.
    """
    p = PARTS[split]
    first, last, place = (rng.choice(p[n]) for n in ("first", "last", "place"))
    chance = rng.random() if split == "train" else 1.0
    if chance < 0.2:
        first, last, place = (made_up(rng).capitalize() for _ in range(3))
    elif chance < 0.7 and names:
        first, last, place = (rng.choice(names) for _ in range(3))
    adjective, thing = rng.choice(p["adj"]), rng.choice(p["object"])
    if words and rng.random() < 0.5:
        adjective, thing = rng.choice(words), rng.choice(words)
    kind = rng.randrange(11)
    if kind < 4:
        return f"{first} {last}"
    if kind == 4:
        return f"{rng.choice(['Doctor', 'Professor', 'Captain', 'Mrs.', 'Mr.', 'Miss'])} {last}"
    if kind == 5:
        return f"the {place} {rng.choice(p['building'])}"
    if kind == 6:
        return f"the {adjective} {thing}"
    if kind == 7:
        return f"the {rng.choice(p['building'])} in {place}"
    if kind == 8:
        word = place if chance < 0.7 else rng.choice(p["code"])
        return f"{rng.choice(['Project', 'Team', 'Operation', 'Agent', 'Station'])} {word}"
    if kind == 9:
        return f"the {thing} of {first} {last}"
    return place


def make_value(rng: Random, kind: str, split: str = "train", words: _Words = None) -> str:
    """Return a number of 3 to 7 digits, or one or two words."""
    if kind == "digits":
        n = rng.choice((3, 4, 4, 5, 5, 6, 6, 7))
        return str(rng.randint(10 ** (n - 1), 10**n - 1))
    pool = words or PARTS[split]["words"]

    def word() -> str:
        if split == "train" and rng.random() < 0.25:
            return made_up(rng)
        return rng.choice(pool)

    value = word() if rng.random() < 0.75 else f"{word()} {word()}"
    return value.title() if rng.random() < 0.15 else value


def noun_phrase(form: str, attribute: str, entity: str) -> str:
    if form == "of":
        return f"the {attribute} of {entity}"
    if form == "for":
        return f"the {attribute} for {entity}"
    return f"{entity}'{'' if entity.endswith('s') else 's'} {attribute}"


def fill(template: str, attribute: str, entity: str, value: str, form: str) -> str:
    """Fill a sentence or question template and return it with a capital first letter."""
    np = noun_phrase(form, attribute, entity)
    return template.format(np=np, NP=capital(np), a=attribute, e=entity, E=capital(entity), v=value, V=capital(value))


def make_facts(
    rng: Random, n: int, *, value: str = "digits", entities: str = "train", phrasing: str = "train",
    same_template: bool | None = None, words: _Words = None, names: _Words = None, templates: _Templates | None = None,
) -> list[Fact]:  # fmt: skip
    """Return `n` facts with different entities and different values.

    Args:
        rng (random.Random): the only source of chance.
        n (int): the number of facts.
        value (str): "digits", "word" or "mixed". Default: "digits".
        entities, phrasing (str): "train" or "heldout". Default: "train".
        same_template (bool): whether all share one attribute and one sentence template, so that
            only the entity tells them apart. Default: ``None``, decided by chance.
        words (list of str): values that are words come from these, and some attributes and objects.
            Default: the built-in lists.
        names (list of str): more names of people and places (training). Default: ``None``.
        templates (tuple): a list of sentences and one of questions, as in wordlists.py, to take the
            place of the built-in ones of `phrasing`. Default: ``None``.

    Raises:
        ValueError: if `value` is none of the three.
    """
    if value not in VALUES:
        raise ValueError(f"[facts] 'value' must be 'digits', 'word' or 'mixed' but got {value!r}.")
    if same_template is None:
        same_template = rng.random() < 0.5
    templates = templates or (w.SENTENCES[phrasing], w.QUESTIONS[phrasing])
    facts: list[Fact] = []
    seen: set[str] = set()
    shared: dict[str, Any] | None = None
    while len(facts) < n:
        kind = rng.choice(("digits", "word")) if value == "mixed" else value
        if shared is None or not same_template:
            shared = _draw_template(rng, kind, entities, phrasing, words, templates)
        if same_template:
            kind = shared["kind"]
        fact = _make_fact(rng, shared, entities, phrasing, words, names)
        marks = {fact.value.lower(), fact.entity.lower()}
        if marks & seen or (shared["bare"] and fact.key in seen):
            if shared["bare"]:
                shared = None
            continue
        seen |= marks | {fact.key}
        facts.append(fact)
    return facts


def make_attribute(rng: Random, kind: str, entities: str = "train", words: _Words = None) -> str:
    """Return what is said of an entity: "access code", or with `words` also "walnut number"."""
    if words and rng.random() < 0.35:
        return f"{rng.choice(words)} {rng.choice(w.GENERIC[kind])}"
    return rng.choice(PARTS[entities]["digits_attr" if kind == "digits" else "word_attr"])


def _draw_template(rng: Random, kind: str, entities: str, phrasing: str, words: _Words, templates: _Templates) -> dict:
    s, q = (rng.randrange(len(listed)) for listed in templates)
    sentence, question = templates[0][s], templates[1][q]
    attribute = make_attribute(rng, kind, entities, words)
    bare = phrasing == "heldout" and rng.random() < 0.3
    if bare:
        attribute = f"{rng.choice(w.BARE_ADJ)} {rng.choice(w.BARE_NOUN[kind])}"
    form, other = rng.choice(("of", "for", "poss")), rng.choice(("of", "for", "poss"))
    if "{np}" not in question and "{NP}" not in question:
        form, other = "of", "of"  # what the question leaves open, the answer settles in one way
    return {
        "kind": kind, "sentence": sentence, "question": question, "ids": (s, q), "attribute": attribute, "bare": bare,
        "form": form, "ask_form": form if rng.random() < 0.6 else other, "lead": rng.choice(w.LEADS),
    }  # fmt: skip


def _make_fact(rng: Random, t: dict[str, Any], entities: str, phrasing: str, words: _Words, names: _Words) -> Fact:
    attribute, kind, form = t["attribute"], t["kind"], t["form"]
    value = make_value(rng, kind, entities, words)
    if t["bare"]:
        key = f"the {attribute}"
        sentence, question = f"The {attribute} is {value}.", f"What is the {attribute}?"
        return Fact(key, value, kind, sentence, question, f"The {attribute} is {value}.", value, "bare", "", attribute)
    entity = make_entity(rng, entities, names, words)
    sentence = fill(t["sentence"], attribute, entity, value, form)
    if phrasing == "train" and t["lead"]:
        keep = entity.split()[0] not in ("the",) and not sentence.startswith(("The ", "They", "Some", "Every"))
        keep = keep and not sentence.startswith(("One ", "It ", "In ", "For ", "We "))
        sentence = t["lead"] + (sentence if keep else sentence[:1].lower() + sentence[1:])
    question = fill(t["question"], attribute, entity, value, t["ask_form"])
    key = noun_phrase(t["ask_form"], attribute, entity)
    s, q = t["ids"]
    template = f"{phrasing[0]}{s}:{form}/q{q}:{t['ask_form']}"
    return Fact(key, value, kind, sentence, question, f"{capital(key)} is {value}.", value, template, entity, attribute)


def make_multi_value(rng: Random, n_values: int, **options: Any) -> Task:
    """Return a Task: one key that is given several values, all of which are asked for.

    Args:
        rng (random.Random), n_values (int): as their names say.
        options: `value`, `entities`, `names` and `words` of `make_facts`; `entity` to fix the key.
    """
    entities, words = options.get("entities", "train"), options.get("words")
    kind = options.get("value", "digits")
    kind = rng.choice(("digits", "word")) if kind == "mixed" else kind
    attribute = make_attribute(rng, kind, entities, words)
    entity = options.get("entity") or make_entity(rng, entities, options.get("names"), words)
    values: list[str] = []
    while len(values) < n_values:
        value = make_value(rng, kind, entities, words)
        if value.lower() not in (x.lower() for x in values):
            values.append(value)
    frame = rng.randrange(len(w.MULTI_SENTENCES))
    sentences = tuple(w.MULTI_SENTENCES[frame].format(a=attribute, e=entity, v=v) for v in values)
    ask = rng.randrange(len(w.MULTI_QUESTIONS))
    question = w.MULTI_QUESTIONS[ask].format(a=attribute, e=entity, n=n_values)
    answer = f"The {attribute}s for {entity} are {join(values)}."
    return Task(sentences, tuple(values), question, answer, join(values), f"values{frame}/{ask}", kind)


def make_multi_query(rng: Random, facts: Iterable[Fact], n: int = 2) -> Task:
    """Return a Task that asks for `n` of the given facts in one question.

    The sentences are those of all `facts`, in their order; the answer follows the question's.
    """
    chosen = rng.sample(list(facts), n)
    ask = rng.randrange(len(w.QUERY_QUESTIONS))
    question = w.QUERY_QUESTIONS[ask].format(keys=join(f.key for f in chosen))
    values = tuple(f.value for f in chosen)
    answer = " ".join(f.answer for f in chosen)
    return Task(tuple(f.sentence for f in facts), values, question, answer, join(values), f"query{ask}", chosen[0].kind)


def make_key_value(
    rng: Random, n_pairs: int, *, value: str = "digits", entities: str = "train", style: str | None = None,
    words: _Words = None, names: _Words = None,
) -> Task:  # fmt: skip
    """Return a Task whose one sentence is a list of `n_pairs` keys with values; one is asked for.

    Args:
        rng (random.Random), n_pairs (int): as their names say.
        value (str): "digits", "word" or "mixed". Default: "digits".
        entities (str): "train" or "heldout". Default: "train".
        style (str): "lines", "dash", "equals" or "json". Default: ``None``, by chance.
        words, names (list of str): as in `make_facts`.
    """
    style = style or rng.choice(("lines", "lines", "dash", "equals", "json"))
    key_kind = rng.choice(("name", "word", "code"))
    pairs: dict[str, tuple[str, str]] = {}
    while len(pairs) < n_pairs:
        kind = rng.choice(("digits", "word")) if value == "mixed" else value
        p = PARTS[entities]
        if key_kind == "name":
            key = f"{rng.choice(p['first'])} {rng.choice(p['last'])}"
            if entities == "train" and rng.random() < 0.3:
                key = f"{made_up(rng).capitalize()} {made_up(rng).capitalize()}"
            elif names and rng.random() < 0.5:
                key = f"{rng.choice(names)} {rng.choice(names)}"
        elif key_kind == "word":
            made = entities == "train" and rng.random() < 0.3
            key = made_up(rng) if made else f"{rng.choice(p['adj'])} {rng.choice(words or p['words'])}"
        else:
            key = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2)) + str(rng.randint(100, 9999))
        item = make_value(rng, kind, entities, words)
        if key in pairs or any(item == there for there, _ in pairs.values()):
            continue
        pairs[key] = item, kind
    if style == "json":
        text = "{\n" + ",\n".join(f'  "{k}": "{v}"' for k, (v, _) in pairs.items()) + "\n}"
    else:
        mark = {"lines": "{}: {}", "dash": "- {}: {}", "equals": "{} = {}"}[style]
        text = "\n".join(mark.format(k, v) for k, (v, _) in pairs.items())
    key = rng.choice(list(pairs))
    value, kind = pairs[key]
    ask = rng.randrange(len(w.KEY_QUESTIONS))
    question = w.KEY_QUESTIONS[ask].format(k=key)
    return Task((text,), (value,), question, f"The value of {key} is {value}.", value, f"kv-{style}/{ask}", kind)


def join(items: Iterable[str]) -> str:
    """Join words as English does: "a, b and c"."""
    items = list(items)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def user_message(document: str, question: str, style: str = "after") -> str:
    """Return the text of a user turn that holds a document and a question about it.

    Args:
        document, question (str): both are stripped of outer white space.
        style (str): "after" (document, blank line, question: the default of every evaluator),
            "before" (the question first), "both" (before and after), or "labelled".
    """
    document, question = document.strip(), question.strip()
    if style == "after":
        return f"{document}\n\n{question}"
    if style == "before":
        return f"{question}\n\n{document}"
    if style == "both":
        return f"{question}\n\n{document}\n\n{question}"
    if style == "labelled":
        return f"Text:\n{document}\n\nQuestion: {question}"
    raise ValueError(f"[user_message] 'style' must be after, before, both or labelled but got {style!r}.")


def is_correct(reply: str, values: str | Iterable[str]) -> bool:
    """Tell whether every value stands in the reply as a whole number or word, case ignored."""
    values = (values,) if isinstance(values, str) else values
    return all(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reply, re.IGNORECASE) for v in values)
