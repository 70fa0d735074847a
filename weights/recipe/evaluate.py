"""Measure the model while it trains: perplexity of held-out books, and answers to held-out tasks.

An answer counts as right ("exact") if greedy decoding would give every token of the reference
answer, which one forward pass tells, and as "value" if the tokens of the value are right after the
reference's stem. Both are bounds: the evaluators of mlx_dsa decode for real.
"""

import math
import random

import chats as C
import numpy as np
import rows as R
import torch

from mlx_dsa.tasks.problems import make_problems

# name: (length, specification of the case)
CELLS = {
    "digits-512": (512, {"facts": 4, "turns": 1, "value": "digits"}),
    "digits-2k": (2048, {"facts": 4, "turns": 1, "value": "digits"}),
    "digits-4k": (4096, {"facts": 4, "turns": 1, "value": "digits"}),
    "digits-8k": (8192, {"facts": 4, "turns": 1, "value": "digits"}),
    "digits-16k": (16384, {"facts": 4, "turns": 1, "value": "digits"}),
    "words-2k": (2048, {"facts": 4, "turns": 1, "value": "word"}),
    "words-4k": (4096, {"facts": 4, "turns": 1, "value": "word"}),
    "words-8k": (8192, {"facts": 4, "turns": 1, "value": "word"}),
    "digits-4k-numbers": (4096, {"facts": 4, "turns": 1, "value": "digits", "numbers": 0.5}),
    "words-4k-numbers": (4096, {"facts": 4, "turns": 1, "value": "word", "numbers": 0.5}),
    "phrasing-2k": (2048, {"facts": 1, "turns": 1, "value": "mixed", "phrasing": "heldout"}),
    "phrasing-4k": (4096, {"facts": 1, "turns": 1, "value": "mixed", "phrasing": "heldout"}),
    "phrasing-4facts-4k": (4096, {"facts": 4, "turns": 1, "value": "digits", "phrasing": "heldout"}),
    "brief-4k": (4096, {"facts": 4, "turns": 1, "value": "mixed", "brief": True}),
    "turns3-4k": (4096, {"facts": 4, "turns": 3, "value": "mixed"}),
    "own-turn-4k": (4096, {"facts": 4, "turns": 2, "value": "mixed", "style": "turn"}),
    "before-4k": (4096, {"facts": 4, "turns": 1, "value": "mixed", "style": "before"}),
    "values-4k": (4096, {"facts": 2, "turns": 1, "value": "digits", "task": "values"}),
    "query-4k": (4096, {"facts": 4, "turns": 1, "value": "digits", "task": "query"}),
    "keys12-4k": (4096, {"facts": 12, "turns": 1, "value": "digits"}),
    "kv64-2k": (2048, {"facts": 64, "value": "digits", "task": "key_value"}),
    "kv160-4k": (4096, {"facts": 120, "value": "mixed", "task": "key_value"}),
}
QUICK = ("digits-512", "digits-2k", "digits-8k", "words-4k", "words-4k-numbers", "phrasing-2k", "kv64-2k")


class Suite:
    """Held-out cases, the same at every call; each rank takes its share."""

    def __init__(self, args, corpus, rank, world):
        self.args, self.corpus, self.rank, self.world = args, corpus, rank, world
        self.rows = R.Rows(corpus, split="heldout")

    def cases(self, name, n):
        length, spec = CELLS[name]
        spec = {"task": "single", "numbers": 0.0, "style": "after", **spec}
        made = []
        for i in range(self.rank, n, self.world):
            rng, case = random.Random(f"cases-{name}-{i}"), None
            while case is None:
                case = self.rows.needle(rng, length, spec)
            made.append(case)
        return made

    def problems(self, n):
        rng = random.Random("cases-problems")
        return [
            self.rows.told(C.chat([(p.question, p.answer)]), [p.answer], R.PROBLEM)
            for p in make_problems(rng, n, "heldout")[self.rank :: self.world]
        ]

    def judge(self, model, device, cases, width, strict):
        """Return (right values, right answers, cases) over this rank's share, which `cases` is."""
        right, mine = np.zeros(3), cases
        per = max(1, self.args.size // width)
        for i in range(0, len(mine), per):
            part = mine[i : i + per]
            tokens = np.full((per, width), self.corpus.eot, np.int64)
            weights = np.zeros((per, width), np.uint8)
            for j, (t, x) in enumerate(part):
                tokens[j, : len(t)], weights[j, : len(t)] = t, x
            flat = torch.from_numpy(tokens).to(device).view(-1)
            guess = model.predict(flat, width).view(per, width).cpu().numpy()
            hit = np.ones((per, width), bool)
            hit[:, 1:] = guess[:, :-1] == tokens[:, 1:]
            for j in range(len(part)):
                value, answer = weights[j] == R.VALUE, weights[j] >= strict
                right += (hit[j][value].all(), hit[j][answer].all(), 1)
        return right

    def perplexity(self, model, device, windows):
        """Return [sum of losses, tokens] over held-out windows of 4096 (next token of each)."""
        size = self.args.size // 4096 * 4096
        books, total = self.corpus.books, np.zeros(3)
        count = min(windows, (len(books) - 1) // 4096)
        mine = np.linspace(0, (len(books) - 1) // 4096 - 1, count).astype(int)[self.rank :: self.world]
        per = max(1, size // 4096)
        with torch.no_grad():
            for i in range(0, len(mine) - per + 1, per):
                part = np.stack([books[w * 4096 : w * 4096 + 4097] for w in mine[i : i + per]]).astype(np.int64)
                part = torch.from_numpy(part).to(device)
                losses = model(part[:, :-1].reshape(-1), part[:, 1:].reshape(-1), 4096)
                total += (losses.double().sum().item(), losses.numel(), 0)
        return total

    def run(self, model, device, quick):
        names = QUICK if quick else list(CELLS)
        n = 64 if quick else self.args.cases
        if self.args.steps:
            names, n = names[:2], 4
        found = {}
        for name in names:
            width = CELLS[name][0] if CELLS[name][0] < 16384 else 18432  # tiles the compiled size
            found[name] = self.judge(model, device, self.cases(name, n), width, R.ANSWER)
        found["problems"] = self.judge(model, device, self.problems(2 * n), 512, R.PROBLEM)
        found["perplexity"] = self.perplexity(model, device, (72 if quick else 360) if not self.args.steps else 4)
        table = torch.tensor(np.stack(list(found.values())), device=device)
        if self.world > 1:
            torch.distributed.all_reduce(table)
        result = {}
        for (name, _), (a, b, c) in zip(found.items(), table.tolist()):
            if name == "perplexity":
                result[name] = round(math.exp(a / max(b, 1)), 3)
            elif name == "problems":
                result[name] = round(b / c, 4)
            else:
                result[name] = [round(a / c, 4), round(b / c, 4)]
        return result
