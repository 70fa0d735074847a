"""Are the questions of needles.py answered as dense answers them, after the text is cut to a budget?

    python ask.py MODEL needles.json RUN [--shares 0.25 0.125] [--cpu]

A reply counts if, given dense's own greedy reply so far, every token up to the end of the value
comes first: less than what `mlx-dsa eval needle` counts, in which a reply may be worded otherwise.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import probe as P
from teacher import Teacher


def replies(teacher, text, question, kept, stop, most=32):
    """Return the greedy reply to a question over a whole text, as tokens."""
    ids = torch.tensor(text + question, device=teacher.device)
    reply, start = [], len(text)
    while len(reply) < most:
        logits, kept = P.read_on(teacher, ids, start, kept)
        token = int(logits[-1].argmax())
        if token in stop:
            break
        reply.append(token)
        start, ids = len(ids), torch.cat([ids, torch.tensor([token], device=ids.device)])
    return reply


def told(tokenizer, reply, values):
    """Return how many tokens of a reply tell the value, 0 if it is not in it."""
    for n in range(1, len(reply) + 1):
        text = tokenizer.decode(reply[:n]) + " "
        if all(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", text, re.IGNORECASE) for v in values):
            return n
    return 0


def ways(views, spans, shares):
    """Yield (name, kept positions by layer) of every way to cut a text to a share of it."""
    names = [n for n in views[0][2] if "+" not in n]
    heads = [n for n in names if n not in ("snap", "keydiff", "window")]
    for share in shares:
        budget = int(views[0][0].shape[1] * share)
        mixed = [(f"{n}+{w}keydiff", n, w) for n in heads for w in (0.5, 1.0)]
        for name, of, weight in [(n, n, 0) for n in names] + mixed:
            at = []
            for _, _, scores in views:
                score = scores[of]
                if weight:
                    score = P._standard(score) + weight * P._standard(scores["keydiff"])
                at.append(P.keep(score, budget, name != "window"))
            yield f"{name}@{share}", at
        at = []
        for _, _, scores in views:
            forced = scores[heads[0]].clone()
            for start, stop in spans:
                forced[start:stop] = 1e6
            at.append(P.keep(forced, budget))
        yield f"forced@{share}", at


def main():
    """Print a line for each way: the share of dense's right replies that stay, as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("needles")
    parser.add_argument("run")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--heads", nargs="+", help="kinds of heads; default: all of the run")
    parser.add_argument("--limit", type=int, help="texts")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    teacher = Teacher(args.model, device, torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    items = json.loads(Path(args.needles).read_text())
    files = sorted(Path(args.run).glob("heads-*.safetensors"))
    heads = {p.stem.removeprefix("heads-"): load_file(str(p)) for p in files}
    heads = {n: h for n, h in heads.items() if not args.heads or n in args.heads}
    heads = {n: {k: v.float().to(device) for k, v in h.items()} for n, h in heads.items()}
    right, asked, began, counts = 0, 0, time.time(), {}
    with torch.no_grad():
        for number, text in enumerate(items["texts"][: args.limit]):
            ids = torch.tensor(text["ids"], device=device)
            views = [(v.keys, v.values, P._scores(heads, n, v, lse)) for n, v, lse, _ in teacher.views(ids)]
            every = torch.arange(len(ids), device=device)
            dense = [(k, v, every) for k, v, _ in views]
            questions = []
            for question in text["questions"]:
                reply = replies(teacher, text["ids"], question["ids"], dense, items["stop"])
                n = told(tokenizer, reply, question["values"])
                asked, right = asked + 1, right + bool(n)
                if n:
                    questions.append((question, reply[:n]))
            spans = [s for q in text["questions"] for s in q["spans"]]
            for way, at in ways(views, spans, args.shares):
                kept = [(k[:, a], v[:, a], a) for (k, v, _), a in zip(views, at)]
                for question, reply in questions:
                    tail = torch.tensor(text["ids"] + question["ids"] + reply, device=device)
                    logits = P.read_on(teacher, tail, len(ids), kept)[0][-len(reply) - 1 : -1]
                    same = (logits.argmax(-1) == tail[-len(reply) :]).all()
                    counts[way] = counts.get(way, 0) + int(same)
            print(f"{number + 1} texts, dense {right} of {asked}, {time.time() - began:.0f} s", flush=True)
    for way, n in counts.items():
        print(f"{items['phrasing']} {items['length']} {way}: {n} of {right} {n / max(1, right):.3f}")


if __name__ == "__main__":
    main()
