"""The items of the needle evaluator: facts hidden in prose, and what is asked about them.

The tasks are RULER's [1]: one fact among distractors, several keys, several values of one key,
several questions at once, and a list of keys with values.

[1] Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from .facts import (
    VALUES,
    Fact,
    Task,
    is_correct,
    make_facts,
    make_key_value,
    make_multi_query,
    make_multi_value,
    stem_of,
)
from .haystack import Haystack
from .options import check_choices, option
from .prompts import CLOSINGS, MORE_CLOSINGS, Frame, begun, evened, frame
from .wordlists import SPLITS

TASKS = ("single", "multi-key", "multi-value", "multi-query", "key-value")
SETTINGS = ("in-prompt", "before-question", "two-turns")


@dataclass(frozen=True)
class Turn:
    """Tokens to feed, and what the model should then say; no values: it is not asked.

    An opening is a prompt's beginning; the next turn ends it.
    """

    ids: list[int]
    values: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    opening: bool = False

    def correct(self, reply: str) -> bool:
        """Whether the reply names every value, and no other fact's that is not part of one."""
        wrong = [v for v in self.others if not any(is_correct(value, v) for value in self.values)]
        return is_correct(reply, self.values) and not any(is_correct(reply, v) for v in wrong)


@dataclass(frozen=True)
class NeedleItem:
    """One case.

    Args:
        key (str): names the case.
        turns (tuple of Turn): what is fed; the last one is the one that is judged.
        spans (list of (int, int)): where in the prompt the sentences stand that hold the answer.
        values (list of (int, int)): where in them the answer itself stands.
        question (str), expected (str): for the reader.
        length (int), depth (float): the cell.
    """

    key: str
    turns: tuple[Turn, ...]
    spans: list[tuple[int, int]]
    values: list[tuple[int, int]]
    question: str
    expected: str
    length: int
    depth: float


@dataclass(frozen=True)
class NeedleSpec:
    """What the cases of a run are like.

    Args:
        task (str): one of `TASKS`.
        setting (str): one of `SETTINGS`: the question stands in the prompt; or the prompt is
            pruned before the question arrives; or the judged question is the second, about what
            the first did not ask.
        value (str): "digits", "word" or "mixed".
        phrasing (str): "train" or "heldout" (wordings that the bundled model never saw).
        distractors (int): further facts of the same kinds in the same text.
        per_document (int): how many of a text's facts are asked for, each in a conversation of its
            own; not in setting "two-turns". The text is then read once for all.
        seed (int): of everything random.
        turns (int): questions one after the other in each conversation, each about another fact;
            the last is judged, the first reported too; only in setting "before-question".
        even (bool): whether questions are made equally long, as `evened` does, which answers many
            at once.
        stem (bool): whether each reply is begun with the answer up to its value, for the model to go
            on; not for task "multi-query", whose answer has a stem for each value.
    """

    task: str = option("single", "What is hidden and asked.", choices=TASKS)
    setting: str = option("in-prompt", "When the question comes.", choices=SETTINGS)
    value: str = option("digits", "What the fact tells.", choices=VALUES)
    phrasing: str = option(
        "train", "Wordings of facts and questions; the bundled model saw those of train.", choices=SPLITS
    )
    distractors: int = option(3, "Other facts in the text.", least=0)
    per_document: int = option(
        1, "Questions about each text, which is read once; not with --setting two-turns.", least=1
    )
    seed: int = 0
    turns: int = option(
        1,
        "Questions one after the other in a conversation, with --setting before-question; the last is judged.",
        least=1,
    )
    even: bool = option(
        False, "Make the questions of a run equally long, by words of no weight: they are answered at once."
    )
    stem: bool = option(False, "Begin each reply with the answer up to its value; not with --task multi-query.")

    def __post_init__(self) -> None:
        check_choices("NeedleSpec", self, "task", "setting")
        if self.setting == "two-turns" and self.task != "single":
            raise ValueError("[NeedleSpec] setting 'two-turns' goes with task 'single' only.")
        if self.stem and self.task == "multi-query":
            raise ValueError("[NeedleSpec] 'stem' does not go with task 'multi-query': its answer has several stems.")
        single, n_facts = self.task == "single", self.distractors + 1
        several = self.setting != "two-turns" and single and 1 <= self.per_document <= n_facts
        if self.per_document != 1 and not several:
            raise ValueError(
                "[NeedleSpec] 'per_document' needs setting 'before-question' or 'in-prompt', task 'single' "
                f"and no fewer facts than it asks for, but got {self.per_document} of {n_facts}."
            )
        several = self.setting == "before-question" and single and 1 <= self.turns <= n_facts
        if self.turns != 1 and not several:
            raise ValueError(
                "[NeedleSpec] 'turns' needs setting 'before-question', task 'single' and no fewer facts "
                f"than it asks for, but got {self.turns} of {n_facts}."
            )

    @property
    def reads_first(self) -> bool:
        """Whether a text is read before its questions, in a turn of its own."""
        return self.setting == "before-question" or self.per_document > 1


def fields_of(spec: Any) -> dict[str, Any]:
    """Return what a spec says; what it leaves as it always was stays out of the results' identity."""
    before = {"turns": 1, "even": False, "stem": False}
    return {k: v for k, v in asdict(spec).items() if k not in before or v != before[k]}


@dataclass(frozen=True)
class _Question:
    """A question, its answer, values of other facts, the sentences that hold it, and how it begins."""

    text: str
    values: tuple[str, ...]
    others: tuple[str, ...]
    held_by: tuple[int, ...]
    stem: str = ""


def _case(rng: random.Random, spec: NeedleSpec) -> tuple[list[str], list[list[_Question]]]:
    """Return the sentences to hide, and the conversations about them: lists of questions."""
    options: dict[str, Any] = {"value": spec.value, "entities": "heldout", "phrasing": spec.phrasing}

    def stem(asked: Fact | Task) -> str:
        return stem_of(asked) if spec.stem else ""

    if spec.task in ("single", "multi-key"):
        many = spec.task == "multi-key"
        two = spec.setting == "two-turns"
        n = 1 + max(spec.distractors, 7 if many else 0, 1 if two else 0)
        facts = make_facts(rng, n, same_template=True if many else None, **options)
        questions = [
            _Question(f.question, (f.value,), tuple(g.value for g in facts if g is not f), (i,), stem(f))
            for i, f in enumerate(facts)
        ]
        talks = [questions[1::-1]] if two else _talks(questions, spec)
        return [f.sentence for f in facts], talks
    others: tuple[str, ...] = ()
    if spec.task == "key-value":
        task = make_key_value(rng, 20, value=spec.value, entities="heldout")
    elif spec.task == "multi-value":
        del options["phrasing"]
        task = make_multi_value(rng, 4, **options)
    else:
        facts = make_facts(rng, 1 + max(spec.distractors, 3), **options)
        task = make_multi_query(rng, facts, n=2)
        others = tuple(f.value for f in facts if f.value not in task.values)
    # What holds an answer comes first: the first sentence is the one whose depth is given.
    hidden = sorted(task.sentences, key=lambda s: not any(is_correct(s, v) for v in task.values))
    needed = sum(any(is_correct(s, v) for v in task.values) for s in hidden)
    return hidden, [[_Question(task.question, task.values, others, tuple(range(needed)), stem(task))]]


def _talks(questions: Sequence[_Question], spec: NeedleSpec) -> list[list[_Question]]:
    """Return conversations of `turns` questions, each of which ends with a question of its own."""
    n = len(questions)
    ahead = range(spec.turns - 1, -1, -1)
    return [[questions[(j + i) % n] for i in ahead] for j in range(spec.per_document)]


def make_items(
    spec: NeedleSpec,
    haystack: Haystack,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
) -> list[NeedleItem]:
    """Return the cases of a grid.

    Args:
        spec (NeedleSpec): what they are like.
        haystack (Haystack): the prose.
        tokenizer: of the model.
        lengths (list of int): tokens of the whole first prompt with its question, exactly. Where a
            document is read before its questions, of it and the longest question about any: so all
            documents are equally long, and can be read at once.
        depths (list of float): 0 is the start of the document, 1 its end.
        n (int): texts for each length and depth.
    """
    around = frame(tokenizer)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False)) if text else []

    drafts = []
    for length, d, i in itertools.product(lengths, range(len(depths)), range(n)):
        key = f"{spec.task}/{spec.setting}/{length}/{depths[d]:.2f}/{i}"
        rng = random.Random(f"{spec.seed}/{spec.value}/{spec.phrasing}/{key}")
        sentences, talks = _case(rng, spec)
        drafts.append(_Draft(key, rng, length, d, sentences, talks))
    tokens = iter(tokens_of([talk for draft in drafts for talk in draft.talks], spec.even, encode, around))
    drafts = [draft._replace(tails=[next(tokens) for _ in draft.talks]) for draft in drafts]
    longest = max((len(tail[0]) for draft in drafts for tail in draft.tails), default=0)
    head = encode(around.head)
    items: list[NeedleItem] = []
    for draft in drafts:
        reserved = longest if spec.reads_first else len(draft.tails[0][0])
        room = draft.length - len(head) - reserved
        items += _items(spec, draft, haystack, tokenizer, head, room, depths)
    return items


class _Draft(NamedTuple):
    """A text before its prose is chosen, by what `rng` then draws."""

    key: str
    rng: random.Random
    length: int
    d: int
    sentences: list[str]
    talks: list[list[_Question]]
    tails: Sequence[list[list[int]]] = ()


class _Asked(Protocol):
    """A question, and how the reply to it begins."""

    @property
    def text(self) -> str: ...

    @property
    def stem(self) -> str: ...


def tokens_of(
    talks: Sequence[Sequence[_Asked]], even: bool, encode: Callable[[str], list[int]], around: Frame
) -> list[list[list[int]]]:
    """Return the tokens of each question, of what the chat format puts around it, and of its stem.

    That is a list a talk.

    Args:
        talks (list): of lists of questions, equally many in each.
        even (bool): whether those of a turn are made equally long.
        encode (callable): from a text to its tokens.
        around (Frame): the chat format.
    """
    turns = []
    for number, questions in enumerate(zip(*talks)):
        before = around.again if number else ""
        texts = [question.text for question in questions]
        afters = [begun(around.tail, question.stem) for question in questions]
        if even:
            begins = any(question.stem for question in questions)
            turns.append(evened(texts, encode, before, afters, MORE_CLOSINGS if begins else CLOSINGS))
        else:
            turns.append([encode(before + text + after) for text, after in zip(texts, afters)])
    return [list(tokens) for tokens in zip(*turns)]


def _items(
    spec: NeedleSpec,
    draft: _Draft,
    haystack: Haystack,
    tokenizer: Any,
    head: list[int],
    room: int,
    depths: Sequence[float],
) -> list[NeedleItem]:
    """Return the cases of one text: one, or `per_document`."""
    key, rng, length, d, sentences, talks, tails = draft
    # The facts that are asked for take turns at the depths; where the others stand is chance.
    places = [depths[(d + j) % len(depths)] for j in range(spec.per_document)]
    places += [rng.random() for _ in sentences[spec.per_document :]]
    placed = haystack.place(sentences, places, room, rng, ending="\n\n")
    document = head + placed.ids
    items = []
    for j, (talk, tail) in enumerate(zip(talks, tails)):
        first, last = talk[0], talk[-1]
        if spec.reads_first:
            opening = Turn(document, opening=spec.setting == "in-prompt")
            turns = [opening, Turn(tail[0], first.values, first.others)]
        else:
            turns = [Turn(document + tail[0], first.values, first.others)]
        turns += [Turn(ids, q.values, q.others) for q, ids in zip(talk[1:], tail[1:])]
        spans = [(a + len(head), b + len(head)) for a, b in (placed.spans[k] for k in last.held_by)]
        values = [v for span in spans for v in locate(tokenizer, document, span, last.values)]
        name = key if spec.per_document == 1 else f"{key}/{j}"
        asked = (last.text, ", ".join(last.values), length, places[j])
        items.append(NeedleItem(name, tuple(turns), spans, values, *asked))
    return items


def locate(tokenizer: Any, ids: Sequence[int], span: tuple[int, int], values: Iterable[str]) -> list[tuple[int, int]]:
    """Return the token spans, inside a sentence's, in which the values stand."""
    start, stop = span
    ends = [len(tokenizer.decode(ids[start : i + 1])) for i in range(start, stop)]
    text = tokenizer.decode(ids[start:stop])
    found = []
    for value in values:
        match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)
        if match:
            first = next(i for i, end in enumerate(ends) if end > match.start())
            last = next(i for i, end in enumerate(ends) if end >= match.end())
            found.append((start + first, start + last + 1))
    return found
