"""The report of eval/kvpress_peer.py, which says how to come by what this reads."""

import argparse
import json
from pathlib import Path

from kvpress_peer import BUDGETS, KINDS, LENGTH, MAX_TOKENS, SHARED

from mlx_dsa.evals.report.stats import paired_proportions
from mlx_dsa.evals.running.results import versions, write_result
from mlx_dsa.evals.subject import fingerprint
from mlx_dsa.tasks.needle_items import Turn

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
    records = []
    for file in work.glob(f"ours-{kind}*.json"):
        records += json.loads(file.read_text())["items"]
    for file in work.glob(f"ours-{kind}*.json.jsonl"):
        records += [r for line in file.read_text().splitlines()[1:] for r in json.loads(line)["records"]]
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
    """Return a share of right answers in per cent."""
    return f"{points(right):.1f}" if right else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="the folder of the runs")
    parser.add_argument("out", type=Path, help="where the report goes")
    options = parser.parse_args()
    write_report(options.work, options.out)


if __name__ == "__main__":
    main()
