"""Arithmetic word problems in GSM8K's format: worked steps with <<48/2=24>> notes, then "#### N".

People, things and combinations of numbers are split into train and held-out parts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .wordlists import SPLITS

_T = TypeVar("_T")
# A question, the worked steps, and the answer.
_Worked = tuple[str, list[str], int]


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Args:
        question: the problem as a reader sees it.
        answer: worked steps, one a line, ending in "#### N".
        value: N, an int.
        template: the name of its kind.
    """

    question: str
    answer: str
    value: int
    template: str


PEOPLE = """Ada Ben Carla Dan Ella Finn Grace Hugo Iris Jack Karen Leo Mia Noah Olive Paul Quinn Rosa Sam Tina
Uma Victor Wendy Xavier Yara Zoe Amy Brian Chloe David Eric Fiona George Holly Ivan Julia Kevin Laura Mark Nina
Oscar Penny Ralph Sophie Tom Ursula Vera Will Yvonne Zack""".split()
THINGS = """apples pears books pencils marbles stamps cookies shells coins stickers balloons oranges lemons buttons
cards candles flowers eggs muffins cupcakes bottles boxes beads crayons magnets ribbons peaches melons tickets toys
hats scarves mugs plates spoons rings stones feathers nuts plums""".split()
HOLDERS = "bags boxes baskets crates jars shelves rows trays packs bins".split()
GOODS = """shirt book ticket lamp chair pen notebook mug plant toy hat cake scarf basket kite ball clock candle
bag blanket""".split()
ACTIONS = """find|finds|found buy|buys|bought collect|collects|collected pick|picks|picked win|wins|won
make|makes|made""".split()
LOSSES = "gives away|sells|loses|breaks|donates|uses".split("|")


def _part(items: Sequence[str], split: str) -> list[str]:
    if split not in SPLITS:
        raise ValueError(f"[problems] 'split' must be 'train' or 'heldout' but got {split!r}.")
    return [x for i, x in enumerate(items) if (i % 5 == 4) == (split == "heldout")]


def held_out_words() -> list[str]:
    """Return the people and things that no training saw."""
    return [word for items in (PEOPLE, THINGS, HOLDERS, GOODS) for word in _part(items, "heldout")]


class _Draw:
    """Names and numbers of one problem."""

    def __init__(
        self,
        rng: random.Random,
        split: str,
        names: Sequence[str] | None = None,
        things: Sequence[str] | None = None,
    ) -> None:
        self.rng = rng
        self.names = rng.sample(names if names and rng.random() < 0.5 else _part(PEOPLE, split), 3)
        self.things = rng.choice(things if things and rng.random() < 0.5 else _part(THINGS, split))
        self.holders = rng.choice(_part(HOLDERS, split))
        self.good = rng.choice(_part(GOODS, split))

    def pick(self, *options: _T) -> _T:
        return self.rng.choice(options)

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)


def _gain_loss(d: _Draw) -> _Worked:
    a, b = d.number(5, 60), d.number(3, 40)
    c = d.number(2, a + b - 1)
    name, t = d.names[0], d.things
    verb = d.rng.choice(ACTIONS).split("|")[1]
    loss = d.rng.choice(LOSSES)
    q = d.pick(
        f"{name} has {a} {t}. {name} {verb} {b} more and then {loss} {c} of them. How many {t} does {name} have now?",
        f"In the morning {name} has {a} {t}. During the day {name} {verb} {b} more {t}, and in the evening "
        f"{name} {loss} {c}. How many {t} are left?",
        f"{name} starts with {a} {t}, {verb} {b} more, and {loss} {c}. How many {t} does {name} end up with?",
    )
    steps = [
        f"After that, {name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {t}.",
        f"In the end, {name} has {a + b} - {c} = <<{a + b}-{c}={a + b - c}>>{a + b - c} {t}.",
    ]
    return q, steps, a + b - c


def _groups(d: _Draw) -> _Worked:
    n, each, extra = d.number(2, 9), d.number(3, 12), d.number(2, 30)
    name, t, h = d.names[0], d.things, d.holders
    q = d.pick(
        f"{name} has {n} {h} with {each} {t} in each of them, and {extra} more {t} on the table. "
        f"How many {t} does {name} have in all?",
        f"There are {n} {h}, and each holds {each} {t}. {name} brings {extra} more {t}. How many {t} are there now?",
        f"{name} fills {n} {h} with {each} {t} each and has {extra} {t} left over. "
        f"How many {t} did {name} have at first?",
    )
    p = n * each
    steps = [
        f"The {h} hold {n} * {each} = <<{n}*{each}={p}>>{p} {t}.",
        f"Together that is {p} + {extra} = <<{p}+{extra}={p + extra}>>{p + extra} {t}.",
    ]
    return q, steps, p + extra


def _groups_less(d: _Draw) -> _Worked:
    n, each = d.number(2, 9), d.number(3, 12)
    p = n * each
    less = d.number(1, p - 1)
    name, t, h = d.names[0], d.things, d.holders
    loss = d.rng.choice(LOSSES)
    q = d.pick(
        f"{name} buys {n} {h} of {t}. There are {each} {t} in each. If {name} {loss} {less} {t}, how many are left?",
        f"{n} {h} hold {each} {t} each. {name} {loss} {less} of the {t}. How many {t} remain?",
    )
    steps = [
        f"There are {n} * {each} = <<{n}*{each}={p}>>{p} {t}.",
        f"Then {p} - {less} = <<{p}-{less}={p - less}>>{p - less} {t} are left.",
    ]
    return q, steps, p - less


def _half(d: _Draw) -> _Worked:
    half, name, other, t = d.number(3, 40), d.names[0], d.names[1], d.things
    whole = 2 * half
    q = d.pick(
        f"{name} sold {whole} {t} in April and half as many in May. How many {t} did {name} sell altogether?",
        f"{name} has {whole} {t}, and {other} has half as many. How many {t} do they have together?",
    )
    who = name if "sold" in q else other
    steps = [
        f"{who} {'sold' if who == name else 'has'} {whole} / 2 = <<{whole}/2={half}>>{half} {t}"
        + (" in May." if who == name else "."),
        f"Altogether that is {whole} + {half} = <<{whole}+{half}={whole + half}>>{whole + half} {t}.",
    ]
    return q, steps, whole + half


def _times_as_many(d: _Draw) -> _Worked:
    k, a, (x, y, _), t = d.pick(2, 3, 4, 5), d.number(3, 20), d.names, d.things
    word = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}[k]
    b = k * a
    q = d.pick(
        f"{x} has {a} {t}. {y} has {word} as many {t} as {x}. How many {t} do they have together?",
        f"{y} picked {word} as many {t} as {x}. {x} picked {a}. How many {t} did they pick in total?",
    )
    steps = [
        f"{y} has {a} * {k} = <<{a}*{k}={b}>>{b} {t}.",
        f"Together they have {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {t}.",
    ]
    return q, steps, a + b


def _difference(d: _Draw) -> _Worked:
    a, more, (x, y, _), t = d.number(5, 50), d.number(2, 30), d.names, d.things
    q = d.pick(
        f"{x} has {a} {t}. {y} has {more} more {t} than {x}. How many {t} do {x} and {y} have together?",
        f"{x} found {a} {t}, and {y} found {more} more than {x}. How many {t} did the two find in all?",
    )
    b = a + more
    steps = [
        f"{y} has {a} + {more} = <<{a}+{more}={b}>>{b} {t}.",
        f"Together they have {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {t}.",
    ]
    return q, steps, a + b


def _shopping(d: _Draw) -> _Worked:
    n, price, name, g = d.number(2, 9), d.number(2, 12), d.names[0], d.good
    cost = n * price
    paid = cost + d.number(1, 40)
    q = d.pick(
        f"A {g} costs ${price}. {name} buys {n} of them and pays with ${paid}. How much change does {name} get?",
        f"{name} has ${paid} and buys {n} {g}s at ${price} each. How many dollars does {name} have left?",
    )
    steps = [
        f"The {g}s cost {n} * {price} = $<<{n}*{price}={cost}>>{cost}.",
        f"So ${paid} - ${cost} = $<<{paid}-{cost}={paid - cost}>>{paid - cost} is left.",
    ]
    return q, steps, paid - cost


def _wages(d: _Draw) -> _Worked:
    rate, hours, bonus, name = d.number(5, 15), d.number(2, 9), d.number(5, 40), d.names[0]
    pay = rate * hours
    q = d.pick(
        f"{name} earns ${rate} an hour. {name} works {hours} hours and gets a tip of ${bonus}. "
        f"How many dollars does {name} earn in all?",
        f"For each hour of work {name} is paid ${rate}. After {hours} hours {name} also gets ${bonus} extra. "
        f"How much money does {name} get?",
    )
    steps = [
        f"The work pays {rate} * {hours} = $<<{rate}*{hours}={pay}>>{pay}.",
        f"With the extra money that is {pay} + {bonus} = $<<{pay}+{bonus}={pay + bonus}>>{pay + bonus}.",
    ]
    return q, steps, pay + bonus


def _share(d: _Draw) -> _Worked:
    n, each, name, t = d.number(2, 9), d.number(3, 12), d.names[0], d.things
    total = n * each
    kept = d.number(2, 20)
    q = d.pick(
        f"{name} has {total + kept} {t}. {name} keeps {kept} and shares the rest equally among {n} friends. "
        f"How many {t} does each friend get?",
        f"From {total + kept} {t}, {kept} are thrown away. {name} puts the others into {n} {d.holders}, the same "
        f"number in each. How many {t} does each of the {d.holders} hold?",
    )
    steps = [
        f"There are {total + kept} - {kept} = <<{total + kept}-{kept}={total}>>{total} {t} to share.",
        f"Each gets {total} / {n} = <<{total}/{n}={each}>>{each} {t}.",
    ]
    return q, steps, each


def _week(d: _Draw) -> _Worked:
    per, days, pages, name = d.number(4, 20), d.number(2, 9), d.number(3, 40), d.names[0]
    read = per * days
    total = read + pages
    q = d.pick(
        f"{name} is reading a book of {total} pages. {name} reads {per} pages a day for {days} days. "
        f"How many pages are left?",
        f"A book has {total} pages. If {name} reads {per} pages every day, how many pages remain after {days} days?",
    )
    steps = [
        f"{name} reads {per} * {days} = <<{per}*{days}={read}>>{read} pages.",
        f"So {total} - {read} = <<{total}-{read}={pages}>>{pages} pages are left.",
    ]
    return q, steps, pages


def _three(d: _Draw) -> _Worked:
    a, b, c = d.number(4, 40), d.number(4, 40), d.number(4, 40)
    (x, y, z), t = d.names, d.things
    s = a + b
    q = d.pick(
        f"{x} has {a} {t}, {y} has {b} and {z} has {c}. How many {t} do the three have in total?",
        f"{x}, {y} and {z} collect {t}. {x} has {a}, {y} has {b} and {z} has {c}. How many {t} is that in all?",
    )
    steps = [
        f"{x} and {y} have {a} + {b} = <<{a}+{b}={s}>>{s} {t}.",
        f"With those of {z} that makes {s} + {c} = <<{s}+{c}={s + c}>>{s + c} {t}.",
    ]
    return q, steps, s + c


KINDS = {
    "gain_loss": _gain_loss, "groups": _groups, "groups_less": _groups_less, "half": _half,
    "times_as_many": _times_as_many, "difference": _difference, "shopping": _shopping, "wages": _wages,
    "share": _share, "week": _week, "three": _three,
}  # fmt: skip


def is_held_out(question: str) -> bool:
    """Tell whether the numbers of a question are a combination that no training saw (one in five)."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    return sum(n * k for n, k in zip(numbers, (1, 3, 9, 27))) * 7 % 11 % 5 == 4


def make_problem(
    rng: random.Random,
    split: str = "train",
    kind: str | None = None,
    names: Sequence[str] | None = None,
    things: Sequence[str] | None = None,
) -> Problem:
    """Return a random Problem.

    Args:
        rng (random.Random): the only source of chance.
        split (str): "train" or "heldout": whose names, things and numbers. Default: "train".
        kind (str): one of `KINDS`. Default: ``None``, any.
        names, things (list of str): more people and things (plural) to draw from, in half of the
            problems. Default: ``None``.
    """
    kind = kind or rng.choice(list(KINDS))
    while True:
        question, steps, value = KINDS[kind](_Draw(rng, split, names, things))
        if is_held_out(question) == (split == "heldout"):
            return Problem(question, "\n".join([*steps, f"#### {value}"]), value, kind)


def make_problems(rng: random.Random, n: int, split: str = "train") -> list[Problem]:
    """Return `n` different problems."""
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = make_problem(rng, split)
        found[problem.question] = problem
    return list(found.values())
