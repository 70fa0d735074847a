"""The items of the code evaluator: questions about long stretches of real Python source.

Constants are planted as a programmer would write them, between statements and at their indentation;
definitions and functions are those that stand there anyway.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .code_window import Lines, Mark, Window, line_ends
from .facts import VALUES, is_correct, make_value
from .needle_items import NeedleItem, Turn, locate, tokens_of
from .options import check_choices, option
from .prompts import frame
from .source import Definition, Function, Source
from .wordlists import PARTS

TASKS = ("constants", "definitions", "functions")
SETTINGS = ("in-prompt", "before-question")

# (scope, text, how a question calls it). In the recipes' training rows are forms like those of "train",
# and neither a form nor a question of "heldout".
FORMS = {
    "train": (
        ("module", "{NAME} = {v}", "`{NAME}`"),
        ("class", "{name} = {v}", "the class attribute `{name}`"),
        ("function", "{name} = {v}", "the variable `{name}`"),
        ("module", '{NAME} = {{"{key}": {v}}}', 'the entry "{key}" of `{NAME}`'),
        (
            "module",
            "def {name}({key}={v}):\n    return {key}",
            "the default of `{key}` in `{name}`",
        ),
        ("module", "class {Name}(Enum):\n    {KEY} = {v}", "the member `{KEY}` of `{Name}`"),
        ("function", "# the {words} is {v}", "the {words}"),
    ),
    "heldout": (
        ("function", "if ({name} := {v}) is None:\n    return", "the variable `{name}`"),
        ("module", '{Name} = type("{Name}", (), {{"{key}": {v}}})', "the attribute `{key}` of `{Name}`"),
        ("function", 'kwargs.pop("{name}", {v})', 'the argument "{name}" where it is not given'),
        (
            "module",
            "{name} = functools.partial(connect, {key}={v})",
            "the argument `{key}` of `{name}`",
        ),
        ("function", 'log.debug("{words}: %s", {v})', "the {words} that is logged"),
        ("class", "{name} = property(lambda self: {v})", "the property `{name}`"),
    ),
}
QUESTIONS = {
    "train": (
        "What is the value of {what}?",
        "What is {what} in the code above?",
        "Which value does {what} have?",
        "Look up {what} and tell me its value.",
    ),
    "heldout": (
        "Can you check {what} for me?",
        "I am debugging. What does the code give for {what}?",
        "Remind me of {what}.",
        "Somewhere in these files stands {what}. What is it?",
    ),
}
STEM = "The value of {what} is"
_KEYS = {
    "digits": "limit timeout size count port retries offset threshold capacity budget".split(),
    "word": "label mode prefix alias theme channel tag region profile title".split(),
}
_DRAWS = 2000  # of constants: their words are few, and all differ in a text


@dataclass(frozen=True)
class CodeSpec:
    """What the cases of a run are like.

    Args:
        task (str): "constants" (planted), "definitions" (what the files themselves define) or
            "functions" (to be written as they stand).
        setting (str): the question stands in the prompt, or the prompt is pruned before it arrives.
        value (str): of planted constants: "digits", "word" or "mixed".
        phrasing (str): "train" or "heldout": forms of constants, and wordings of questions.
        per_document (int): questions about a text, each in a conversation of its own; so many
            constants are planted.
        seed (int): of everything random.
        stem (bool): whether each reply is begun, for the model to go on: with a sentence up to the
            value, or with a block of code up to the function's name.
    """

    task: str = option(
        "constants",
        "What is asked for: constants planted among the code, its own definitions, or its functions.",
        choices=TASKS,
    )
    setting: str = option("before-question", "When the question comes.", choices=SETTINGS)
    value: str = option("mixed", "Of planted constants.", choices=VALUES)
    phrasing: str = option(
        "train",
        "Forms of constants and wordings of questions: those that training has too, or others.",
        choices=tuple(FORMS),
    )
    per_document: int = option(4, "Questions about each text, which is read once.", least=1)
    seed: int = 0
    stem: bool = option(False, "Begin each reply with the answer up to its value, or a function up to its name.")

    def __post_init__(self) -> None:
        check_choices("CodeSpec", self, "task", "setting", "value", "phrasing")
        if self.per_document < 1:
            raise ValueError(f"[CodeSpec] 'per_document' must be at least 1 but got {self.per_document}.")


@dataclass(frozen=True)
class FunctionTurn(Turn):
    """A turn that asks for a function: right if its first two body lines stand in the reply."""

    def correct(self, reply: str) -> bool:
        """Whether the lines follow one another in the reply, leading and trailing blanks aside."""
        said = [line.strip() for line in reply.splitlines() if line.strip()]
        return tuple(self.values) in list(zip(said, said[1:]))


@dataclass(frozen=True)
class _Question:
    """A question, the values of its answer, those of other answers, and how the reply begins."""

    text: str
    values: tuple[str, ...]
    others: tuple[str, ...] = ()
    stem: str = ""


def make_code_items(
    spec: CodeSpec,
    source: Source,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
) -> list[NeedleItem]:
    """Return the cases of a grid.

    Args:
        spec (CodeSpec): what they are like.
        source (Source): the code.
        tokenizer: of the model.
        lengths (list of int): tokens of the text and the longest question about any, at most.
        depths (list of float): where what is asked for is to stand: 0 is the start of the text, 1 its
            end. They take turns. A case's depth is the one that is nearest to where it does stand.
        n (int): texts for each length and depth.

    Raises:
        ValueError: if the source is too short, or holds too little to ask for.
    """
    around = frame(tokenizer)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []

    window = Window(source, encode, line_ends(source, tokenizer))
    head, drafts = encode(around.head), []
    before: dict[int, set[Definition | Function]] = {length: set() for length in lengths}
    for length, d, i in itertools.product(lengths, range(len(depths)), range(n)):
        key = f"{spec.task}/{spec.setting}/{length}/{depths[d]:.2f}/{i}"
        rng = random.Random(f"{spec.seed}/{spec.value}/{spec.phrasing}/{key}")
        places = [depths[(d + j) % len(depths)] for j in range(spec.per_document)]
        lines = window.choose(rng, length, lambda lines: _enough(spec, source, window, lines, places))
        marks, questions = _ask(spec, source, window, rng, lines, places, before[length])
        drafts.append((key, length, places, lines, marks, questions))
    talks = [[question] for *_, questions in drafts for question in questions]
    tokens = iter(tokens_of(talks, True, encode, around))
    tails = [[next(tokens)[0] for _ in questions] for *_, questions in drafts]
    longest = max((len(tail) for some in tails for tail in some), default=0)
    items = []
    for (key, length, _, lines, marks, questions), some in zip(drafts, tails):
        room = length - len(head) - longest
        ids, spans = window.cut(lines, marks, room)
        document, spans = head + ids, [(a + len(head), b + len(head)) for a, b in spans]
        stand = [min(depths, key=lambda d: abs(d - a / len(document))) for a, _ in spans]
        kind = FunctionTurn if spec.task == "functions" else Turn
        for j, (question, tail) in enumerate(zip(questions, some)):
            opening = Turn(document, opening=spec.setting == "in-prompt")
            turn = kind(tail, question.values, question.others)
            values = [spans[j]]
            if spec.task != "functions":
                values = locate(tokenizer, document, spans[j], question.values)
            about = (question.text, "\n".join(question.values), length, stand[j])
            items.append(NeedleItem(f"{key}/{j}", (opening, turn), [spans[j]], values, *about))
    return items


def _enough(spec: CodeSpec, source: Source, window: Window, lines: Lines, places: Sequence[float]) -> bool:
    """Whether lines hold enough to ask for."""
    if spec.task == "constants":
        return len(source.within("gaps", lines.sure, lines.stop)) >= 2 * spec.per_document
    return _chosen(spec, source, window, lines, places) is not None


def _candidates(spec: CodeSpec, source: Source, lines: Lines) -> list[Any]:
    """Return what can be asked about lines and has one answer in them."""
    found = source.within(spec.task, lines.sure, lines.stop)
    if len(found) < spec.per_document:
        return []
    # Where the lines are fewer tokens than they should be, the text begins some lines before them.
    start = max(0, lines.start - (lines.stop - lines.start) // 8 - 16)
    text = "\n".join(source.lines[start : lines.stop])
    return [x for x in found if len(re.findall(x.pattern, text)) == 1]


def _chosen(
    spec: CodeSpec,
    source: Source,
    window: Window,
    lines: Lines,
    places: Sequence[float],
    before: Collection[Any] = (),
) -> list[Any] | None:
    """Return what is asked about; ``None`` if there is too little.

    It is what was not asked about before, of a length, and nearest to its place.
    """
    candidates = _candidates(spec, source, lines)
    wanted = [window.line_at(lines, place) for place in places]
    # What is new may stand in the way of all else.
    return _nearest(candidates, wanted, before) or _nearest(candidates, wanted)


def _nearest(candidates: Sequence[Any], wanted: Sequence[int], before: Collection[Any] = ()) -> list[Any] | None:
    """Return a candidate for each of some lines, those not asked about before first, or ``None``."""
    chosen: list[Any] = []
    for line in wanted:
        # Neither the same lines nor, where there is another, the same answer twice.
        left = [x for x in candidates if all(_apart(x, y) for y in chosen)]
        left = left or [x for x in candidates if all(x.stop <= y.start or x.start >= y.stop for y in chosen)]
        if not left:
            return None
        chosen.append(min(left, key=lambda x: (x in before, abs(x.start - line))))
    return chosen


def _ask(
    spec: CodeSpec,
    source: Source,
    window: Window,
    rng: random.Random,
    lines: Lines,
    places: Sequence[float],
    before: set[Definition | Function],
) -> tuple[list[Mark], list[_Question]]:
    """Return the marks in some lines, and the questions about them."""
    if spec.task == "constants":
        return _plant(spec, source, window, rng, lines, places)
    chosen = _chosen(spec, source, window, lines, places, before)
    assert chosen is not None  # else no such lines were found
    before.update(chosen)
    marks = [Mark(x.start, x.stop) for x in chosen]
    if spec.task == "functions":
        ask = "Write the function `{}` as it stands in the code above."
        begin = "```python\ndef {}" if spec.stem else ""
        return marks, [_Question(ask.format(x.name), x.body, (), begin.format(x.name)) for x in chosen]
    asks = [rng.choice(QUESTIONS[spec.phrasing]) for _ in chosen]
    return marks, _about_values(spec, [(ask, x.what, x.value) for ask, x in zip(asks, chosen)])


def _about_values(spec: CodeSpec, asked: Sequence[tuple[str, str, str]]) -> list[_Question]:
    """Return questions, given how each is worded, what it is about, and the value of that."""
    values = [value for *_, value in asked]
    stem = STEM if spec.stem else ""
    return [
        _Question(ask.format(what=what), (value,), _others(values, value), stem.format(what=what))
        for ask, what, value in asked
    ]


def _apart(first: Definition | Function, second: Definition | Function) -> bool:
    """Whether two definitions or functions are some lines apart, with different answers."""
    near = first.start < second.stop + 4 and second.start < first.stop + 4
    return not near and getattr(first, "value", 1) != getattr(second, "value", 2)


def _others(values: Iterable[str], own: str) -> tuple[str, ...]:
    """Return the other values, for a reply to name none of, where they aren't part of the own."""
    return tuple(v for v in values if not is_correct(own, v))


def _plant(
    spec: CodeSpec,
    source: Source,
    window: Window,
    rng: random.Random,
    lines: Lines,
    places: Sequence[float],
) -> tuple[list[Mark], list[_Question]]:
    """Return constants as lines between statements, and the questions about them."""
    marks: list[Mark] = []
    made: list[tuple[str, str, str]] = []
    used: set[str | int] = set()
    gaps = source.within("gaps", lines.sure, lines.stop)
    for _ in range(_DRAWS):
        if len(made) == len(places):
            break
        kind = rng.choice(("digits", "word")) if spec.value == "mixed" else spec.value
        scope, text, what = rng.choice(FORMS[spec.phrasing])
        words = [rng.choice(PARTS["heldout"][part]) for part in ("adj", "object")]
        key, value = rng.choice(_KEYS[kind]), make_value(rng, kind, "heldout")
        wanted = window.line_at(lines, places[len(made)])
        some = [g for g in gaps if g.scope == scope and g.line not in used]
        if used & {*words, value} or is_correct(" ".join([*words, key]), value) or not some:
            continue
        used |= {*words, value}
        gap = min(some, key=lambda g: abs(g.line - wanted))
        used.add(gap.line)
        name = "_".join([*words, key])
        fields = {
            "name": name,
            "NAME": name.upper(),
            "Name": "".join(word.title() for word in words),
            "words": " ".join([*words, key]),
            "key": key,
            "KEY": key.upper(),
            "v": value if kind == "digits" else f'"{value}"',
        }
        planted = [gap.indent + line for line in text.format(**fields).split("\n")]
        marks.append(Mark(gap.line, gap.line, (*planted, *[""] * gap.blank)))
        ask = rng.choice(QUESTIONS[spec.phrasing])
        made.append((ask, what.format(**fields), value))
    else:
        raise ValueError(f"[make_code_items] there is no room for {len(places)} constants in a text.")
    return marks, _about_values(spec, made)
