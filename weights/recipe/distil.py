"""Make the indexers of the bundled model: write the text mixture, then distil on it.

    python weights/recipe/distil.py mixture books-train.jsonl.gz words.json distil.jsonl.gz
    python weights/recipe/distil.py train weights/tiny distil.jsonl.gz OUT

The mixture holds rows that `mlx-dsa train` reads: {"text": ...} for prose, {"messages": [...]} for
documents with facts in them and questions about the facts, and for word problems. Prose alone
gives indexers that retrieve nothing. words.json is what words.py writes. The settings of the run
are in distil.json beside this file.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import chats as C
from tokenizers import Tokenizer

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import problems as P
from mlx_dsa.tasks import wordlists as w
from mlx_dsa.tasks.haystack import sentences

HERE = Path(__file__).resolve().parent
LENGTH = 9216  # tokens of a sequence: longer than the longest context measured
# What fills a sequence of LENGTH tokens, and how often.
MIXTURE = {"needle": 0.58, "short needles": 0.1, "key-value": 0.06, "problems": 0.08, "prose": 0.18}


class Books:
    """Passages of random books, measured in tokens."""

    def __init__(self, path, tokenizer):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            self.texts = [json.loads(line)["text"] for line in file]
        self.tokenizer = tokenizer

    def count(self, text):
        return len(self.tokenizer.encode(text).ids)

    def passage(self, rng, room):
        """Return sentences of one book of together at most `room` tokens."""
        if room < 1:
            return []
        text = rng.choice(self.texts)
        size = 6 * room + 2000
        start = rng.randrange(max(1, len(text) - size))
        pieces = sentences(text[start : start + size])[1:-1]
        kept = []
        for piece, coded in zip(pieces, self.tokenizer.encode_batch(pieces)):
            room -= len(coded.ids)
            if room < 0:
                break
            kept.append(piece)
        return kept


def document(rng, books, hidden, room):
    """Return a passage with `hidden` sentences put between its own, in their order.

    In a third of the documents 20 to 80% of the passage are word problems, so that the number asked
    for does not stand out.
    """
    share = rng.uniform(0.2, 0.8) if rng.random() < 0.35 else 0.0
    room -= sum(books.count(" " + s) for s in hidden)
    pieces = books.passage(rng, int(room * (1 - share)))
    filled = 0
    while filled < share * room - 200:
        problem = P.make_problem(rng, "train")
        text = f" {problem.question} " + " ".join(problem.answer.split())
        filled += books.count(text)
        pieces.insert(rng.randint(0, len(pieces)), text)
    places = sorted(rng.randint(0, len(pieces)) for _ in hidden)
    for place, sentence in reversed(list(zip(places, hidden))):
        starts_line = place == 0 or pieces[place - 1].endswith("\n")
        pieces.insert(place, sentence + " " if starts_line else " " + sentence)
    return "".join(pieces).replace("  ", " ")


def conversation(rng, books, pools, room, listed=False):
    """Return messages: a document, and one to six questions and answers about it."""
    if listed:
        hidden, asked = C.key_value_task(rng, "train", min(room // 2, 2400), pools)
        body = document(rng, books, [], room - books.count(hidden) - 300)
        body = f"{body.strip()}\n\n{hidden}" if rng.random() < 0.5 else f"{hidden}\n\n{body}"
    else:
        hidden, asked = C.needle_task(rng, "train", room, pools)
        body = document(rng, books, hidden, room - 60 * len(asked) - 120)
    system, brief = C.system_prompt(rng)
    style = rng.choices(("after", "labelled", "both", "before"), (0.76, 0.1, 0.06, 0.08))[0]
    messages = [{"role": "system", "content": system}] if system else []
    for number, (question, answer, short, _) in enumerate(asked):
        question, reply = C.ask(rng, question, answer, short, brief, rng.random() < 0.4)
        if number == 0:
            question = F.user_message(body, question, style)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def problems(rng):
    """Return messages: one to four word problems, with examples before the first or not."""
    items = [P.make_problem(rng, "train") for _ in range(rng.choice((1, 1, 2, 4, 7)))]
    if rng.random() < 0.5:
        shots = [f"Question: {p.question}\nAnswer: {p.answer}" for p in items[:-1]]
        items = items[-1:]
        questions = ["\n\n".join([*shots, f"Question: {items[0].question}\nAnswer:"])]
    else:
        questions = [p.question for p in items]
    messages = []
    for question, problem in zip(questions, items):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": problem.answer},
        ]
    return messages


def sequence_rows(rng, books, pools):
    """Return rows that together fill about one sequence of LENGTH tokens."""
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    if kind == "prose":
        return [{"text": "".join(books.passage(rng, LENGTH))}]
    if kind == "problems":
        rows, size = [], 0
        while size < LENGTH:
            rows.append({"messages": problems(rng)})
            size += sum(books.count(m["content"]) + 6 for m in rows[-1]["messages"])
        return rows
    lengths = [LENGTH]
    if kind == "short needles":
        lengths = rng.choice(([LENGTH // 2] * 2, [LENGTH // 4] * 4))
    return [{"messages": conversation(rng, books, pools, n, kind == "key-value")} for n in lengths]


def write_mixture(books_path, words, out, count, seed):
    """Write rows for `count` sequences, in random order, as .jsonl.gz."""
    rng = random.Random(seed)
    books = Books(books_path, Tokenizer.from_file(str(HERE.parent / "tiny" / "tokenizer.json")))
    pools = json.loads(Path(words).read_text(encoding="utf-8"))
    pools.pop("sentences")  # they go between questions in training alone
    own = w.PARTS["train"]["words"]
    pools["words"] += own * (len(pools["words"]) // (8 * len(own)))
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=9) as file:
        for _ in range(count):
            for row in sequence_rows(rng, books, pools):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def train(model_path, data, out, changes):
    """Distil the indexers with the settings in distil.json."""
    from mlx_dsa.presets import load_model
    from mlx_dsa.train import TrainConfig, train_indexers

    settings = json.loads((HERE / "distil.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict({**settings, **changes})
    model, tokenizer = load_model(model_path)

    def report(p):
        if p.held_out:
            means = [sum(x) / len(x) for x in zip(*p.held_out.values())]
            figures = "loss {:.4f} recall {:.3f} mass {:.3f} of {:.3f}".format(*means)
            print(f"step {p.step}/{p.steps} {p.seconds:.0f} s train {p.loss} held out {figures}", flush=True)

    result = train_indexers(model, tokenizer, data, out, config, resume=True, progress=report)
    for layer, score in result.scores.items():
        print(layer, result.best_steps[layer], *(f"{x:.4f}" for x in score))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mix = commands.add_parser("mixture")
    mix.add_argument("books")
    mix.add_argument("words")
    mix.add_argument("out")
    mix.add_argument("--count", type=int, default=1000, help="sequences of 9,216 tokens")
    mix.add_argument("--seed", type=int, default=0)
    run = commands.add_parser("train")
    run.add_argument("model")
    run.add_argument("data")
    run.add_argument("out")
    run.add_argument("--set", type=json.loads, default={}, help="JSON of settings to change")
    args = parser.parse_args()
    if args.command == "mixture":
        write_mixture(args.books, args.words, args.out, args.count, args.seed)
    else:
        train(args.model, args.data, args.out, args.set)
