"""Agreement with kvpress 0.5.5 (PyTorch) on the bundled model and the very items of `mlx-dsa eval needle`.

kvpress wants a virtual environment of its own (`pip install kvpress==0.5.5` and torch), PEER below:

    python eval/kvpress_peer.py items WORK
    PEER/bin/python eval/kvpress_theirs.py WORK --model weights/tiny --kind digits
    python eval/kvpress_peer.py ours WORK
    python eval/kvpress_peer.py report WORK eval/results/kvpress

The second for --kind words too, and both again with --kvzip. Each goes on where it was stopped. A text of
4,096 tokens is read, pressed to K entries, then asked for four facts, each in a conversation of its own.
"""

import argparse
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx_dsa  # noqa: F401  (before MLX: it says which BLAS that uses)
import mlx.core as mx
import numpy as np

from mlx_dsa.config import SparseConfig
from mlx_dsa.evals.haystack import read_haystack
from mlx_dsa.evals.needle import needle
from mlx_dsa.evals.needle_items import NeedleSpec, Turn, make_items
from mlx_dsa.evals.policies import DENSE, Policy
from mlx_dsa.evals.results import versions, write_result
from mlx_dsa.evals.stats import paired_proportions
from mlx_dsa.evals.subject import fingerprint
from mlx_dsa.presets import load_preset
from mlx_dsa.registry import rule_names

KINDS = {"digits": "digits", "words": "word"}
BUDGETS = (128, 256, 512)
LENGTH, DEPTHS, SEED = 4096, (0.1, 0.3, 0.5, 0.7, 0.9), 1
# Rules that kvpress has too, and their names there.
SHARED = ("snapkv", "keydiff", "knorm", "expected_attention", "kvzip", "window", "random")
# Entries on top of K for a question and its answer, where they don't count in.
ROOM = 160
MAX_TOKENS = 32
NOTE = 5.0  # points from which a difference wants a cause


_CONVENTIONS = f"""Per cent of right answers; texts of about {LENGTH:,} tokens, pressed to K entries before the
question, in float32 on a CPU. The same items, questions of one length, greedy answers of at most {MAX_TOKENS}
tokens, one judge.

- **kvpress** keeps K entries a key head (2 a layer here), each head its own, and question and answer on top.
  KVzip shares one pool of K a head, on average, over all layers and heads. Its defaults: SnapKV 64 queries, mean
  over 5 neighbours; ExpectedAttention 512 positions, 4 sinks.
- **ours** keeps one set a layer, K entries with question and answer counted in; 4 sinks and the newest K/4 stay
  in any case; a token is worth what the best of 4 neighbours on each side is (SnapKV, KeyDiff).
- **ours, near**: one set a layer still, but K entries of the text, question and answer on top, no sinks and no
  recent tokens forced, no pooling (SnapKV: 64 queries, the newest 64 forced, best of 2 neighbours on each side;
  ExpectedAttention: all queries, 4 sinks).
- The second table goes from kvpress's rule to ours on kvpress's side, a convention at a time: one set a layer (the
  mean of the heads' scores); 4 sinks and the newest K/4 forced; the best of 4 neighbours. Then ours without and
  with pooling. Differences above {NOTE:.0f} points are bold; p is McNemar's, exact."""


@dataclass(frozen=True)
class OnTop(Policy):
    """A policy that keeps K entries of the text, and question and answer beside them, as kvpress does."""

    keep: int = 0
    kept_file: str | None = None

    @property
    def top_k(self):
        return self.keep

    @contextmanager
    def apply(self, subject, marks=None):
        with super().apply(subject, marks) as patch:
            prune = patch.end_prompts

            def end_prompts(caches):
                if caches[0].size() > self.config.top_k:  # the text's end
                    for cache in caches:
                        cache.budget = self.keep
                    prune(caches)
                    self._note(caches)
                    for cache in caches:
                        cache.budget = self.config.top_k

            patch.end_prompts = end_prompts
            yield patch

    def _note(self, caches):
        """Write down which positions of the first text are kept, once."""
        path = Path(self.kept_file)
        found = json.loads(path.read_text()) if path.exists() else {}
        if self.label not in found:
            found[self.label] = [sorted(c.positions[0].tolist()) for c in caches]
            path.write_text(json.dumps(found))


def ours_policies(kind, work, evict_names):
    """Return the policies of our side: as they are, without pooling, and as near to kvpress's as they go."""
    policies, kept_file = [DENSE], str(work / f"kept-ours-{kind}.json")
    for k in BUDGETS:
        base = {"top_k": k, "n_sink": 4, "n_recent": k // 4, "prefill": "dense"}

        def add(label, evict, **more):
            policies.append(Policy(f"{label}@{k}", SparseConfig(**{**base, "evict": evict, **more})))

        def add_near(name, evict, **more):
            config = SparseConfig(**{**base, "evict": evict, "n_recent": 1, **more, "top_k": k + ROOM})
            policies.append(OnTop(f"{name}, near@{k}", config, keep=k, kept_file=kept_file))

        for name in (*SHARED, "retention"):
            if name in evict_names:
                select = {"select": name} if name in ("window", "random") else {}
                add(name, name, **select)
        for name in ("snapkv", "keydiff"):
            add(f"{name}, pool 0", f"{name}:pool=0")
        add_near("snapkv", "snapkv:pool=2", n_sink=0, n_recent=64, observation_window=64)
        for name, evict in (("keydiff", "keydiff:pool=0"), ("knorm", "knorm:pool=0"), ("retention",) * 2):
            add_near(name, evict, n_sink=0)
        if "expected_attention" in evict_names:
            add_near("expected_attention", "expected_attention:queries=4096")
        if "kvzip" in evict_names:
            add_near("kvzip", "kvzip")
    return policies


def settings(kind):
    """Return what `needle` takes to make the items."""
    return {"setting": "before-question", "per_document": 4, "value": KINDS[kind], "seed": SEED, "even": True}


def items_of(subject, kind, texts):
    """Return our evaluator's own items, four a text."""
    prose = read_haystack(None, subject.tokenizer, False, SEED)
    return make_items(NeedleSpec(**settings(kind)), prose, subject.tokenizer, [LENGTH], DEPTHS, texts)


def write_items(work, texts):
    """Write the items, and logits of a text for the other side to check the model by."""
    subject = load_preset("tiny")
    subject.model.set_dtype(mx.float32)
    work.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        items = []
        for item in items_of(subject, kind, texts):
            document, question = item.turns
            items.append(
                {
                    "key": item.key,
                    "hash": fingerprint([turn.ids for turn in item.turns]),
                    "document": document.ids,
                    "question": question.ids,
                    "values": question.values,
                    "others": question.others,
                }
            )
        (work / f"items-{kind}.json").write_text(json.dumps({"budgets": BUDGETS, "items": items}))
        print(f"{kind}: {len(items)} items, {len(items[0]['document'])} tokens")
    ids = np.array(items[0]["document"][:2048])
    rows = np.arange(0, len(ids), 16)
    logits = subject.model(mx.array(ids)[None])[0][mx.array(rows)]
    np.savez(work / "logits.npz", ids=ids, rows=rows, logits=np.array(logits))


def run_ours(work, texts, kinds):
    """Run our side; the journals of `needle` let it go on."""
    subject = load_preset("tiny")
    subject.model.set_dtype(mx.float32)
    for kind in kinds:
        needle(
            subject,
            ours_policies(kind, work, rule_names("evict")),
            lengths=[LENGTH],
            depths=DEPTHS,
            limit=texts,
            batch_size=len(DEPTHS) * texts,
            max_tokens=MAX_TOKENS,
            name="tiny",
            out=work / f"ours-{kind}.json",
            progress=lambda done, of, key: print(f"{kind}: {done} of {of}, {key}", flush=True),
            **settings(kind),
        )


def read_theirs(work, kind):
    """Return (what was checked, name@K -> item -> right)."""
    spec = json.loads((work / f"items-{kind}.json").read_text())
    judge = {i["key"]: Turn([], tuple(i["values"]), tuple(i["others"])) for i in spec["items"]}
    journals = sorted(work.glob(f"theirs-{kind}*.jsonl"))
    records = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
    found = {}
    for record in (r for r in records if "name" in r):
        label = record["name"] if not record["k"] else f"{record['name']}@{record['k']}"
        right = {key: judge[key].correct(reply.strip()) for key, reply in record["replies"].items()}
        found.setdefault(label, {}).update(right)
    return records[0], {i["key"]: i["hash"] for i in spec["items"]}, found


def read_ours(work, kind, hashes):
    """Return label -> item -> right, of the same items; of a run that goes on, what there is."""
    result = work / f"ours-{kind}.json"
    if result.exists():
        records = json.loads(result.read_text())["items"]
    else:
        lines = result.with_name(f"{result.name}.jsonl").read_text().splitlines()[1:]
        records = [r for line in lines for r in json.loads(line)["records"]]
    found = {}
    for r in records:
        if hashes[r["item"]] != r["hash"]:
            raise ValueError(f"[kvpress_peer] {r['item']} is another item: make the items anew.")
        found.setdefault(r["policy"], {})[r["item"]] = r["correct"]
    return found


def overlap(work, kind):
    """Return name@K -> the share of kept positions of the first text that both sides have, by layer."""
    files = [work / f"kept-{side}-{kind}.json" for side in ("ours", "theirs")]
    ours, theirs = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    found = {}
    for name in ("snapkv", "keydiff", "knorm"):
        for k in BUDGETS:
            a, b = ours.get(f"{name}, near@{k}"), theirs.get(f"{name}, one set@{k}")
            if a and b:
                both = [len(set(x) & set(y)) / k for x, y in zip(a, b)]
                found[f"{name}@{k}"] = [round(x, 4) for x in both]
    return found


def points(right):
    """Return the share of right answers in per cent, or ``None``."""
    return 100 * sum(right.values()) / len(right) if right else None


def orders(mine, other):
    """Return (pairs of rules ordered alike, pairs ordered otherwise), ties of a side left out."""
    names = [n for n in mine if n in other]
    alike, otherwise = [], []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = mine[a] - mine[b], other[a] - other[b]
            if x * y:
                (alike if x * y > 0 else otherwise).append((a, b, round(x, 1), round(y, 1)))
    return alike, otherwise


def write_report(work, out):
    """Write a result a kind, and the tables of both."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# kvpress 0.5.5 and ours", "", _CONVENTIONS, ""]
    for kind in KINDS:
        about, hashes, theirs = read_theirs(work, kind)
        ours, keys = read_ours(work, kind, hashes), list(hashes)
        alike = overlap(work, kind)
        result = {
            "kind": kind,
            "length": LENGTH,
            "budgets": BUDGETS,
            "cases": fingerprint(list(hashes.values())),
            "items": keys,
            "versions": {**versions(), **about["versions"]},
            "logits_differ_by": about["logits"],
            "kept_alike": alike,
            "rows": [
                {"of": of, "rule": label, "n": len(right), "value": points(right) / 100, "right": _bits(right, keys)}
                for of, side in (("kvpress", theirs), ("ours", ours))
                for label, right in side.items()
            ],
        }
        write_result(out / f"{kind}.json", result)
        lines += [f"## {kind.capitalize()}, {len(keys)} items", ""]
        lines += [f"Dense: kvpress {_cell(theirs['dense'])}, ours {_cell(ours['dense'])}.", ""]
        lines += _main_table(theirs, ours)
        lines += _chain_table(theirs, ours)
        shares = [f"{label} {100 * sum(x) / len(x):.1f} ({100 * min(x):.1f})" for label, x in alike.items()]
        told = "Kept by both of the first text's positions (ours *near*, kvpress's *one set*), mean of the layers"
        lines += [f"{told} and the least, per cent: {', '.join(shares) or '-'}.", ""]
    (out / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _bits(right, keys):
    """Return 1 for each item that was right, 0 for wrong, - for one not asked."""
    return "".join("-" if key not in right else str(int(right[key])) for key in keys)


def _main_table(theirs, ours):
    lines = ["| rule | K | kvpress | ours | difference | p | ours, near |", "| --- " * 7 + "|"]
    orderings = []
    for k in BUDGETS:
        sides = {}, {}
        for name in (*SHARED, "retention"):
            a, b = theirs.get(f"{name}@{k}"), ours.get(f"{name}@{k}")
            if not (a or b):
                continue
            gap, p = "-", "-"
            if a and b:
                both = [key for key in a if key in b]
                a, b = ({key: side[key] for key in both} for side in (a, b))
                diff = points(b) - points(a)
                gap = f"**{diff:+.1f}**" if abs(diff) > NOTE else f"{diff:+.1f}"
                p = f"{paired_proportions(list(b.values()), list(a.values()))['p']:.2g}"
                sides[0][name], sides[1][name] = points(a), points(b)
            near = ours.get(f"{name}, near@{k}")
            lines.append(f"| {name} | {k} | {_cell(a)} | {_cell(b)} | {gap} | {p} | {_cell(near)} |")
        alike, otherwise = orders(*sides)
        text = f"Order at K = {k}: {len(alike)} pairs of rules alike, {len(otherwise)} otherwise"
        told = "; ".join(f"{a} over {b}: kvpress {x:+.1f}, ours {y:+.1f}" for a, b, x, y in otherwise)
        orderings.append(f"- {text}{': ' + told if told else ''}.")
    return [*lines, "", *orderings, ""]


def _chain_table(theirs, ours):
    """From kvpress's rule to ours, a convention at a time."""
    steps = ("", ", one set", ", one set, forced", ", one set, forced, pool 4")
    lines = ["| rule | K | kvpress | one set | + forced | + pool 4 | ours, pool 0 | ours |", "| --- " * 8 + "|"]
    for name in ("snapkv", "keydiff", "knorm", "expected_attention"):
        for k in BUDGETS:
            chain = [theirs.get(f"{name}{step}@{k}") for step in steps]
            chain += [ours.get(f"{name}, pool 0@{k}"), ours.get(f"{name}@{k}")]
            lines.append(f"| {name} | {k} | " + " | ".join(map(_cell, chain)) + " |")
    return [*lines, ""]


def _cell(right):
    """Return a share of right answers, with its count where it is not a whole run's."""
    return f"{points(right):.1f}" if right else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=("items", "ours", "report"))
    parser.add_argument("work", type=Path, help="a folder for what is passed between the steps")
    parser.add_argument("out", type=Path, nargs="?", help="where the report goes")
    parser.add_argument("--texts", type=int, default=2, help="texts a depth, four items each (default: 2)")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="default: both")
    options = parser.parse_args()
    if options.step == "items":
        write_items(options.work, options.texts)
    elif options.step == "ours":
        run_ours(options.work, options.texts, options.kind or list(KINDS))
    elif options.out is None:
        parser.error("report needs a folder OUT.")
    else:
        write_report(options.work, options.out)


if __name__ == "__main__":
    main()
