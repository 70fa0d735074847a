"""Facts for rows: made, worded, grouped, corrected, and asked for."""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
import chats as C
import questions as Q
import values as V
import wordings as W

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import wordlists as w


class Fact(NamedTuple):
    """What is told of an entity.

    Args:
        entity, attribute, value, kind (str): See values.py.
        form (str): How attribute and entity are joined, as in facts.noun_phrase.
        old (str): What the value was before it was corrected, or "".
    """

    entity: str
    attribute: str
    value: str
    kind: str
    form: str
    old: str = ""

    def fill(self, template, form=None, value=None):
        """Fill a template of wordings.py."""
        value = self.value if value is None else value
        np = F.noun_phrase(form or self.form, self.attribute, self.entity)
        begins = F.capital(value) if self.kind in V.LOWER else value
        return template.format(
            np=np, NP=F.capital(np), a=self.attribute, A=F.capital(self.attribute), e=self.entity,
            E=F.capital(self.entity), v=value, V=begins, o=self.old,
        )  # fmt: skip


def make_facts(rng, n, pools, share=None):
    """Return `n` facts that no question confuses: different keys, and different values but for states.

    Half of the time several facts share an attribute, or an entity has several.
    """
    facts, keys, said = [], set(), set()
    while len(facts) < n:
        if facts and rng.random() < 0.4:
            other = rng.choice(facts)
            if rng.random() < 0.5:
                entity, kind = V.make_entity(rng, pools), other.kind
                attribute = other.attribute
            else:
                kind = V.make_kind(rng)
                entity, attribute = other.entity, V.make_attribute(rng, kind, pools)
        else:
            kind = V.make_kind(rng)
            entity, attribute = V.make_entity(rng, pools), V.make_attribute(rng, kind, pools)
        value = V.make_value(rng, kind, pools)
        key = (entity.lower(), attribute.lower())
        if key in keys or (value.lower() in said and kind != "state"):
            continue
        keys.add(key)
        said.add(value.lower())
        facts.append(Fact(entity, attribute, value, kind, rng.choice(("of", "of", "for", "poss"))))
    return facts


def say(rng, fact):
    """Return (text, mode): where it may stand is "in" a paragraph, a block of its "own" or an "end"."""
    chance = rng.random()
    if chance < 0.22:
        return fact.fill(rng.choice(W.BLOCKS)), "own"
    if chance < 0.3:
        return fact.fill(rng.choice(W.CLAUSES)), "end"
    template = rng.choice(W.STATED if chance < 0.62 else C.SENTENCES)
    sentence = fact.fill(template)
    if rng.random() < 0.15:
        sentence = rng.choice(W.WRAPPED).format(s=sentence, t=soften(sentence, fact))
    elif rng.random() < 0.1:
        lead = rng.choice(w.LEADS)
        sentence = lead + (soften(sentence, fact) if lead else sentence)
    return sentence, rng.choices(("in", "own"), (0.85, 0.15))[0]


def soften(sentence, fact):
    """Return a sentence with a small letter, unless it begins with a name or with a value as it is written."""
    if sentence.startswith(fact.entity) or sentence.startswith("I "):
        return sentence
    if sentence.startswith(fact.value) and fact.kind not in V.LOWER:
        return sentence
    return sentence[:1].lower() + sentence[1:]


def record(rng, facts):
    """Return one block that tells several facts: a form, a table or lines."""
    style = rng.randrange(7)
    rows = [(F.capital(f.entity), f.attribute, f.value) for f in facts]
    if style == 0:
        return "Name | Item | Entry\n--- | --- | ---\n" + "\n".join(" | ".join(r) for r in rows)
    if style == 1:
        return "\n".join(f"{e}: {a} {v}" for e, a, v in rows)
    if style == 2:
        return "\n".join(f"- {a} of {f.entity}: {v}" for f, (_, a, v) in zip(facts, rows))
    if style == 3:
        return "\n".join(f"{e}\t{a}\t{v}" for e, a, v in rows)
    if style == 4:
        return "\n\n".join(f"{e}\n  {a}: {v}" for e, a, v in rows)
    if style == 5:
        return "; ".join(f"{f.entity}, {a}: {v}" for f, (_, a, v) in zip(facts, rows)) + "."
    return " ".join(f.fill(rng.choice(W.STATED)) for f in facts)


def correct(rng, fact, pools):
    """Return the fact with a value of its past, and the text that tells its present one."""
    old = fact.value
    while old.lower() == fact.value.lower():
        old = V.make_value(rng, fact.kind, pools)
    fact = fact._replace(old=old)
    return fact, fact.fill(rng.choice(W.NEWER))


def share_out(rng, facts, most):
    """Return groups of one to four facts, one group a question, at most `most` where that can be."""
    groups = [[fact] for fact in rng.sample(facts, len(facts))]
    while len(groups) > 1 and (len(groups) > most or rng.random() < 0.08):
        small = sorted(groups, key=len)[:2]
        if len(small[0]) + len(small[1]) > 4:
            break
        groups = [g for g in groups if not any(g is x for x in small)] + [small[0] + small[1]]
    return rng.sample(groups, len(groups))


def ask(rng, facts, group, brief):
    """Return (question, answer, values) about a group of the facts; about one at times by its value."""
    fact = group[0]
    if len(group) > 1:
        keys = F.join(F.noun_phrase(f.form, f.attribute, f.entity) for f in group)
        question = rng.choice(Q.JOINT).format(keys=keys)
        said = [f.value for f in group]
        answer = F.join(said) if brief or rng.random() < 0.5 else " ".join(f.fill("{NP} is {v}.") for f in group)
        return question, answer, said
    alone = sum(f.attribute == fact.attribute and f.value.lower() == fact.value.lower() for f in facts) == 1
    if rng.random() < 0.06 and alone and fact.kind != "state" and not fact.old:
        question = fact.fill(rng.choice(Q.WHOSE))
        answer = F.capital(fact.entity) if brief or rng.random() < 0.6 else f"It is {fact.entity}."
        return question, answer, [fact.entity]
    form = fact.form if rng.random() < 0.6 else rng.choice(("of", "for", "poss"))
    if fact.old and rng.random() < 0.6:
        template = rng.choice(Q.ASK_NEWEST)
    else:
        template = rng.choice(Q.QUESTIONS if rng.random() < 0.55 else C.QUESTIONS)
    question = fact.fill(template, form)
    answer = fact.fill(rng.choice(Q.ANSWERS), form)
    question, answer = C.ask(rng, question, answer, fact.value, brief or rng.random() < 0.5, rng.random() < 0.55)
    return question, answer, [fact.value]
