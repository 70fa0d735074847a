"""Make the retention heads of the bundled model: write the text mixture, then train on it.

    python weights/recipe/retention.py mixture books-train.jsonl.gz retention.jsonl.gz
    python weights/recipe/retention.py train weights/tiny retention.jsonl.gz OUT

A head is taught what is asked of a text later, so every fact in a document of the mixture is asked
for; without facts it keeps none. Half of the documents are full of numbers that nobody asks for.
The settings of the run are in retention.json beside this file.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import chats as C
import distil as D
from tokenizers import Tokenizer

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import problems as P
from mlx_dsa.tasks.haystack import sentences

HERE = Path(__file__).resolve().parent
LENGTH = 4000  # tokens of a sequence
# What fills a sequence of LENGTH tokens, and how often.
MIXTURE = {"facts": 0.75, "prose": 0.18, "problems": 0.07}


def document(rng, books, hidden, room):
    """Return a passage with `hidden` sentences at random places, half of the time among numbers."""
    share = rng.uniform(0.2, 0.7) if rng.random() < 0.5 else 0.0
    room -= sum(books.count(" " + s) for s in hidden)
    pieces = books.passage(rng, int(room * (1 - share)))
    filled = 0
    while filled < share * room - 100:
        problem = P.make_problem(rng, "train")
        text = f" {problem.question} " + " ".join(problem.answer.split())
        filled += books.count(text)
        parts = [f" {p.strip()}" for p in sentences(text)]
        # Whole, or anywhere sentence by sentence.
        place = rng.randint(0, len(pieces))
        for part in parts if rng.random() < 0.3 else [text]:
            pieces.insert(place, part)
            place = rng.randint(0, len(pieces))
    for place, sentence in sorted(((rng.randint(0, len(pieces)), s) for s in hidden), reverse=True):
        starts_line = place == 0 or pieces[place - 1].endswith("\n")
        pieces.insert(place, sentence + " " if starts_line else " " + sentence)
    return "".join(pieces).replace("  ", " ")


def conversation(rng, books, room):
    """Return messages: a document with one to twelve facts, and a question about every one."""
    n = min(rng.choice((1, 2, 3, 4, 4, 4, 6, 8, 12)), max(1, room // 250))
    value = rng.choice(("digits", "word", "mixed"))
    spec = {"facts": n, "turns": n, "value": value, "task": "single"}
    hidden, asked = C.needle_task(rng, "train", room, {}, spec)
    body = document(rng, books, hidden, room - 60 * len(asked) - 60)
    messages = []
    for number, (question, answer, short, _) in enumerate(asked):
        question, reply = C.ask(rng, question, answer, short, False, rng.random() < 0.6)
        if number == 0:
            question = F.user_message(body, question)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def sequence_rows(rng, books):
    """Return rows that together fill about one sequence of LENGTH tokens."""
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    if kind == "prose":
        return [{"text": "".join(books.passage(rng, LENGTH))}]
    if kind == "problems":
        rows, size = [], 0
        while size < LENGTH:
            rows.append({"messages": D.problems(rng)})
            size += sum(books.count(m["content"]) + 6 for m in rows[-1]["messages"])
        return rows
    return [{"messages": conversation(rng, books, LENGTH)}]


def write_mixture(books_path, out, count, seed):
    """Write rows for `count` sequences, in random order, as .jsonl.gz."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_file(str(HERE.parent / "tiny" / "tokenizer.json"))
    books = D.Books(books_path, tokenizer)
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=9) as file:
        for _ in range(count):
            for row in sequence_rows(rng, books):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def train(model_path, data, out, indexers, changes):
    """Train the heads with the settings in retention.json."""
    import mlx.core as mx
    from mlx_lm import load

    from mlx_dsa.train import RetentionConfig, train_retention

    settings = json.loads((HERE / "retention.json").read_text(encoding="utf-8"))
    config = RetentionConfig.from_dict({**settings, **changes})
    model, tokenizer = load(str(model_path))
    model.set_dtype(mx.float32)

    def report(p):
        if p.held_out:
            means = [sum(x) / len(x) for x in zip(*p.held_out.values())]
            figures = "loss {:.4f} agreement at 1/16 {:.3f}, at 1/8 {:.3f}".format(*means)
            print(f"step {p.step}/{p.steps} {p.seconds:.0f} s train {p.loss} held out {figures}", flush=True)

    result = train_retention(model, tokenizer, data, out, config, indexers=indexers, resume=True, progress=report)
    for layer, score in result.scores.items():
        print(layer, result.best_steps[layer], *(f"{x:.4f}" for x in score))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mix = commands.add_parser("mixture")
    mix.add_argument("books")
    mix.add_argument("out")
    mix.add_argument("--count", type=int, default=500, help="sequences of 4,000 tokens")
    mix.add_argument("--seed", type=int, default=7)
    run = commands.add_parser("train")
    run.add_argument("model", help="a folder that holds the model and its indexers")
    run.add_argument("data")
    run.add_argument("out")
    run.add_argument("--indexers", help="where the indexers are, if not with the model")
    run.add_argument("--set", type=json.loads, default={}, help="JSON of settings to change")
    args = parser.parse_args()
    if args.command == "mixture":
        write_mixture(args.books, args.out, args.count, args.seed)
    else:
        indexers = args.indexers or Path(args.model) / "indexers.safetensors"
        train(args.model, args.data, args.out, indexers, args.set)
