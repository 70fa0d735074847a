"""Rows of each kind but code: facts, sentences of the prose, lists, a text that is read twice."""

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import chats as C
import facts_rows as R
import values as V

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import problems as P

TURN = 7  # tokens of the template around a message, at most
READ = C.READ + ["This is the document.", "Take a look at this.", "Have a look at the pages below.",
                 "I will paste a text now.", "Study this; there will be questions.", "Here you are:", "Document:",
                 "See below."]  # fmt: skip
READY = C.READY + ["Done. What do you want to know?", "Understood.", "Ready.", "All right.", "Yes, I have it."]
SYSTEMS = C.HELPFUL + ["You look things up in documents.", "Use the document only.",
                       "You are an assistant in an archive."]  # fmt: skip
BRIEF_SYSTEMS = C.BRIEF_SYSTEM + ["Reply with nothing but what is asked for.", "Be terse."]
AGAIN = ["Repeat the text.", "Please repeat this text word by word.", "Copy the text above.",
         "Write the same text again.", "Say all of it again.", "Print the text once more, unchanged."]  # fmt: skip


class Maker:
    """What rows are made from.

    Args:
        measure (texts.Measure), books (texts.Books), code (texts.Code), pools (values.Pools): sources.
    """

    def __init__(self, measure, books, code, pools):
        self.measure, self.books, self.code, self.pools = measure, books, code, pools
        self.template_size = measure.size({"messages": [{"role": "user", "content": ""}]}) + TURN

    def room(self, length, turns, system=""):
        """Return the tokens that are left for a document beside these (question, answer, ...)."""
        said = [text for turn in turns for text in turn[:2]] + [system]
        return length - self.template_size - sum(self.measure.counts(said)) - 2 * TURN * len(turns) - 40


def system_prompt(rng):
    """Return (system prompt or None, whether answers are brief)."""
    chance = rng.random()
    if chance < 0.7:
        return None, rng.random() < 0.4
    return (rng.choice(SYSTEMS), False) if chance < 0.85 else (rng.choice(BRIEF_SYSTEMS), True)


def converse(rng, document, turns, system=None, read=READ):
    """Return messages: a document, at the beginning or after the first question, and (question, answer) turns."""
    messages = [{"role": "system", "content": system}] if system else []
    style = rng.choices(("after", "labelled", "both", "before", "turn"), (0.42, 0.1, 0.05, 0.07, 0.36))[0]
    if style == "turn":
        intro = f"{rng.choice(read)}\n\n" if rng.random() < 0.75 else ""
        messages += [{"role": "user", "content": intro + document.strip()}]
        messages += [{"role": "assistant", "content": rng.choice(READY)}]
    for number, (question, answer, *_) in enumerate(turns):
        if number == 0 and style != "turn":
            question = F.user_message(document, question, style)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
    return messages


def insert(rng, pieces, inserts):
    """Return pieces of text with others between them.

    Args:
        pieces (list of str): Sentences with the white space before each.
        inserts (list): (depth from 0 to 1, text, mode), see facts_rows.say.
    """
    by_place = {}
    for depth, text, mode in inserts:
        by_place.setdefault(min(len(pieces), int(depth * (len(pieces) + 1))), []).append((text, mode))
    out, fresh = [], True
    for place in range(len(pieces) + 1):
        for text, mode in by_place.get(place, ()):
            ends = out and re.search(r"[a-z]\.$", out[-1])
            if mode == "end" and ends:
                out[-1] = f"{out[-1][:-1]}{text}."
            elif mode == "own":
                out += ["" if fresh else "\n\n", text, "\n\n"]
                fresh = True
            else:  # an end that finds no sentence is one itself
                text = text if mode == "in" else F.capital(text.lstrip(" ,;(-").rstrip(")")) + "."
                out += ["" if fresh else " ", text]
                fresh = False
        if place < len(pieces):
            out.append(pieces[place].lstrip() if fresh else pieces[place])
            fresh = False
    return "".join(out)


def problems(rng, room, measure):
    """Return sentences full of numbers that nobody asks for."""
    parts = []
    while room > 60:
        problem = P.make_problem(rng, "train")
        text = f"{problem.question} " + " ".join(problem.answer.split())
        room -= measure.counts([text])[0] + 2
        parts.append(text)
    return parts


def fact_row(rng, length, maker):
    """Facts among prose, most of them asked for in several turns."""
    system, brief = system_prompt(rng)
    most = max(4, min(24, length // 500))
    facts = R.make_facts(rng, rng.randint(2, most), maker.pools)
    inserts, left = [], list(facts)
    while left:
        depth = rng.random()
        if len(left) >= 3 and rng.random() < 0.12:
            group = [left.pop() for _ in range(rng.randint(3, min(8, len(left))))]
            inserts.append((depth, R.record(rng, group), "own"))
            continue
        fact = left.pop()
        if rng.random() < 0.1:
            newer, text = R.correct(rng, fact, maker.pools)
            facts[facts.index(fact)] = newer
            inserts.append((depth * 0.7, *R.say(rng, newer._replace(value=newer.old))))
            inserts.append((depth * 0.7 + 0.05 + rng.random() * 0.2, text, rng.choice(("in", "own"))))
        else:
            inserts.append((depth, *R.say(rng, fact)))
    # What is not asked for is taught to be forgotten, so most rows ask for all.
    chosen = facts if rng.random() < 0.7 else rng.sample(facts, max(2, round(0.8 * len(facts))))
    most = max(3, min(12, length // 800))
    turns = [R.ask(rng, facts, group, brief) for group in R.share_out(rng, chosen, most)]
    room = maker.room(length, turns, system or "")
    room -= sum(maker.measure.counts([text for _, text, _ in inserts])) + 3 * len(inserts)
    noise = problems(rng, room * rng.uniform(0.03, 0.3), maker.measure) if rng.random() < 0.3 else []
    room -= sum(maker.measure.counts(noise)) + 3 * len(noise)
    inserts += [(rng.random(), text, rng.choice(("in", "own"))) for text in noise]
    document = insert(rng, maker.books.passage(rng, room), inserts)
    return converse(rng, document, turns, system), turns


# A question about a sentence of the text: its kind, then wordings.
CONTINUE = ["How does the sentence go on that begins with \"{x}\"?", "Complete the sentence from the text: \"{x} ...\"",
            "Finish this sentence as it stands in the text: {x}", "What follows after \"{x}\"?",
            "The text has a sentence that starts \"{x}\". How does it end?", "Continue word for word: {x}"]  # fmt: skip
NEXT = ["Which word comes after \"{x}\"?", "What is the word right after \"{x}\" in the text?", "Next word: {x}",
        "\"{x}\" - which word is next?"]  # fmt: skip
QUOTE = ["Quote the sentence with the words \"{x}\".", "Which sentence has the words \"{x}\" in it?",
         "Give the whole sentence in which \"{x}\" stands.", "Find the sentence that contains \"{x}\".",
         "Where does it say \"{x}\"? Quote it."]  # fmt: skip
GAP = ["Fill the gap as in the text: {x}", "Which word is missing here? {x}", "One word was left out of this: {x}"]
SAYS = ['Who says "{x}"?', 'Which person says "{x}"?', 'Whose words are these: "{x}"?', 'Who said "{x}"?']
_SPOKEN = re.compile(r"\"([^\"\n]{15,120}?)[,!?]\" said ([A-Z][a-z]{2,12})(?=[.,;])")


def sentence_turn(rng, document, sentence):
    """Return (question, answer, [answer]) about one sentence of a document, or None if it is not clear."""
    words = sentence.split()
    if not 9 <= len(words) <= 45 or "\n" in sentence:
        return None
    kind = rng.choices("cnqg", (0.45, 0.12, 0.3, 0.13))[0]
    if kind == "c":
        n = rng.randint(4, min(8, len(words) - 3))
        head = " ".join(words[:n])
        if document.count(head) != 1 or head not in sentence:
            return None
        answer = sentence[len(head) :].strip()
        return rng.choice(CONTINUE).format(x=head), answer, [answer]
    n = rng.randint(4, 7)
    at = rng.randint(0, len(words) - n - 1)
    part = " ".join(words[at : at + n])
    if document.count(part) != 1:
        return None
    if kind == "q":
        return rng.choice(QUOTE).format(x=part), sentence, [sentence]
    word = words[at + n].strip(".,;:!?\"'()-_")
    if len(word) < 3 or not word.isalpha():
        return None
    if kind == "n":
        return rng.choice(NEXT).format(x=part), word, [word]
    gap = f"{part} ____ {' '.join(words[at + n + 1 : at + n + 4])}".strip()
    return rng.choice(GAP).format(x=gap), word, [word]


def sentence_turns(rng, document, sentences, n):
    """Return up to `n` questions about sentences from all depths of a document."""
    turns, tries = [], 0
    spoken = [m for m in _SPOKEN.findall(document) if document.count(m[0]) == 1]
    while len(turns) < n and tries < 12 * n:
        tries += 1
        if spoken and rng.random() < 0.08:
            text, who = spoken.pop(rng.randrange(len(spoken)))
            turn = rng.choice(SAYS).format(x=text), rng.choice((who, f"{who} says it.")), [who]
        else:  # one from each part, so that all depths come
            share = (len(turns) + rng.random()) / n
            turn = sentence_turn(rng, document, sentences[int(share * len(sentences))].strip())
        if turn and turn[0] not in [t[0] for t in turns]:
            turns.append(turn)
    return rng.sample(turns, len(turns))


def sentence_row(rng, length, maker):
    """Questions about sentences of a passage: how they go on, which have certain words."""
    system, _ = system_prompt(rng)
    n = rng.randint(3, 8)
    pieces = maker.books.passage(rng, length - maker.template_size - 105 * n - 60)
    document = "".join(pieces)
    turns = sentence_turns(rng, document, pieces, n)
    # What the questions left free is filled at the end, where nobody asked.
    used = sum(maker.measure.counts(pieces)) + 20
    pieces += maker.books.passage(rng, maker.room(length, turns, system or "") - used)
    document = "".join(pieces)
    turns = [t for t in turns if t[2][0] in document]
    return (converse(rng, document, turns, system), turns) if turns else None


def list_keys(rng, n, pools):
    """Return `n` different keys of one kind."""
    kind = rng.choice(("person", "words", "code", "place", "made up", "word", "digits", "path", "entity"))
    keys, seen = [], set()
    while len(keys) < n:
        key = V.make_entity(rng, pools) if kind == "entity" else V.make_value(rng, kind, pools)
        if kind in ("place", "made up", "word") and rng.random() < 0.5:
            key = f"{key} {V.make_value(rng, 'word', pools)}"
        if key.lower() not in seen:
            keys.append(key)
            seen.add(key.lower())
    return keys


LOOK_UP = ["What is the value of {k}?", "{k}?", "Look up {k}.", "What does the list have for {k}?", "Which value has {k}?",
           "Find {k} in the list.", "What stands beside {k}?", "Give me the entry for {k}.", "And {k}?", "{k}:"]  # fmt: skip
LOOK_UP_CELL = ["What is the {c} of {k}?", "Which {c} does {k} have?", "{k}, {c}?", "Look up the {c} for {k}.",
                "In the row of {k}, what stands under {c}?", "{c} of {k}:", "Give the {c} in the row {k}."]  # fmt: skip
LIST_STYLES = ("json", "lines", "equals", "dash", "ini", "yaml", "csv", "tsv", "markdown", "records", "arrow", "dotted")


def make_list(rng, n, pools):
    """Return (text, turns to choose from): a list of `n` keys with values, or a table of several columns."""
    style = rng.choice(LIST_STYLES)
    columns = rng.randint(2, 4) if style in ("csv", "tsv", "markdown", "records") else 1
    kinds = [V.make_kind(rng) for _ in range(columns)]
    heads = []
    while len(heads) < columns:
        head = V.make_attribute(rng, kinds[len(heads)], pools)
        heads += [head] if head not in heads else []
    keys = list_keys(rng, n, pools)
    rows = [[V.make_value(rng, kind, pools) for kind in kinds] for _ in keys]
    pairs = [(k, r[0]) for k, r in zip(keys, rows)]
    mark = {"csv": ",", "tsv": "\t", "markdown": " | "}.get(style)
    if mark:
        lines = [mark.join(["name", *heads])] + [mark.join([k, *r]) for k, r in zip(keys, rows)]
        if style == "markdown":
            lines = [f"| {line} |" for line in lines]
            lines.insert(1, "|" + " --- |" * (columns + 1))
    elif style == "records":
        lines = [json.dumps({"name": k, **dict(zip(heads, r))}, ensure_ascii=False) for k, r in zip(keys, rows)]
    elif style == "json":
        lines = json.dumps(dict(pairs), indent=rng.choice((1, 2, 4)), ensure_ascii=False).split("\n")
    elif style == "ini":
        lines = [f"[{heads[0]}]"] + [f"{k} = {v}" for k, v in pairs]
    elif style == "yaml":
        lines = [f"{heads[0]}:"] + [f"  {k}: {v}" for k, v in pairs]
    else:
        form = {"lines": "{}: {}", "equals": "{}={}", "dash": "- {}: {}", "arrow": "{} -> {}",
                "dotted": "{} .... {}"}[style]  # fmt: skip
        lines = [form.format(k, v) for k, v in pairs]
    turns = []
    for key, row in zip(keys, rows):
        at = rng.randrange(columns)
        ask = rng.choice(LOOK_UP if columns == 1 else LOOK_UP_CELL)
        # In JSON a backslash is written twice; a value with one is not asked for.
        if "\\" not in row[at]:
            turns.append((ask.format(k=key, c=heads[at]), row[at], [row[at]]))
    return "\n".join(lines), turns


def list_row(rng, length, maker):
    """Lists and tables, alone or between passages, in which several keys are looked up."""
    system, _ = system_prompt(rng)
    share = rng.choice((1.0, 1.0, 0.7, 0.4, 0.2))
    n_turns = rng.randint(3, 10)
    room = length - maker.template_size - 60 * n_turns - 40
    lists, used = [], 0
    while used < share * room - 100 and (len(lists) < 1 or used < share * room - 600):
        text, turns = make_list(rng, rng.randint(10, 120), maker.pools)
        size = maker.measure.counts([text])[0] + 4
        while size > room - used and "\n" in text:  # fewer rows
            text, turns = make_list(rng, max(3, int(len(turns) * 0.8 * (room - used) / size)), maker.pools)
            size = maker.measure.counts([text])[0] + 4
            if room - used < 150:
                break
        if size > room - used:
            break
        used += size
        lists.append((text, turns))
    known = [t[0] for _, turns in lists for t in turns]
    turns = [t for _, turns in lists for t in rng.sample(turns, min(len(turns), -(-n_turns // len(lists))))]
    turns = [t for t in turns if known.count(t[0]) == 1]
    turns = rng.sample(turns, min(n_turns, len(turns)))
    pieces = maker.books.passage(rng, maker.room(length, turns, system or "") - used - 20)
    document = insert(rng, pieces, [(rng.random(), text, "own") for text, _ in lists])
    return converse(rng, document, turns, system), turns


def mixed_text(rng, room, maker):
    """Return prose with facts, prose, or code, of at most `room` tokens."""
    chance = rng.random()
    if chance < 0.35:
        return "\n\n".join("".join(s.segments).strip("\n") for s in maker.code.sources(rng, room))
    facts = R.make_facts(rng, rng.randint(2, max(3, min(16, room // 300))), maker.pools) if chance < 0.75 else []
    inserts = [(rng.random(), *R.say(rng, fact)) for fact in facts]
    room -= sum(maker.measure.counts([t for _, t, _ in inserts])) + 4 * len(inserts)
    return insert(rng, maker.books.passage(rng, room), inserts)


def twice_row(rng, length, maker):
    """A text, and the same text again; as text in two equal halves, or repeated by the assistant."""
    if rng.random() < 0.6:
        text = mixed_text(rng, length // 2 - 8, maker).strip() + "\n\n"
        return text + text
    text = mixed_text(rng, (length - maker.template_size - 40) // 2, maker).strip()
    asked = rng.choice(AGAIN)
    content = f"{text}\n\n{asked}" if rng.random() < 0.8 else f"{asked}\n\n{text}"
    return [{"role": "user", "content": content}, {"role": "assistant", "content": text}], []


def plain_row(rng, length, maker):
    """Prose or code as it is."""
    if rng.random() < 0.6:
        return "".join(maker.books.passage(rng, length - 16))
    return "\n\n".join("".join(s.segments).strip("\n") for s in maker.code.sources(rng, length - 16)) + "\n"
