"""What an approximate index finds and costs, by length and settings: `--select hnsw` against `projections`.

    python eval/hnsw_sweep.py BOOKS.jsonl.gz eval/results/hnsw

reads texts of 8,192 tokens, each by itself, puts the search keys of a layer one after another, and for each length,
layer and setting measures what a step of decode takes: microseconds to add an entry, milliseconds to select top_k
entries for one query, and the share of the exact rule's entries that are among them. Entries of many texts stand for
those of one long text. What is there already is not measured again.
"""

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

import mlx_dsa  # noqa: F401  (before MLX: it says which BLAS that uses)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_dsa import FullKVCache, patch_sparse_generate
from mlx_dsa.families import family_of
from mlx_dsa.pictures import save_picture
from mlx_dsa.presets import load_preset
from mlx_dsa.rules import Probe, make_rule
from mlx_dsa.search import Projections
from mlx_dsa.versions import package_version

TEXT, ASKED = 8192, 32
EXACT = "projections"
SETTINGS = (EXACT, "hnsw:m=8,build=32", "hnsw", "hnsw:over=4", "hnsw:m=32,build=128")


def texts(file, tokenizer):
    with gzip.open(file, "rt") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"][: TEXT * 8])
            if len(ids) >= TEXT:
                yield ids[:TEXT]


def vectors(subject, file, layers, length):
    """Return search keys `[T, n]` of each layer, and the queries of the last text's end `[ASKED, n]`."""
    keys, queries, asked = {i: [] for i in layers}, {i: [] for i in layers}, []
    plain = Projections.project_queries

    def recorded(self, x):
        asked.append(plain(self, x))
        return asked[-1]

    for n, ids in enumerate(texts(file, subject.tokenizer), start=1):
        caches = make_prompt_cache(subject.model)
        for start, stop in ((0, -ASKED - 1), (-ASKED - 1, -ASKED)):  # the prompt's last token by itself
            subject.model(mx.array([ids[start:stop]]), cache=caches)
        mx.eval([c.keys for c in caches])
        last = n * TEXT >= length
        if last:
            Projections.project_queries = recorded
            for token in ids[-ASKED:]:
                asked.clear()
                mx.eval(subject.model(mx.array([[token]]), cache=caches))
                for i in layers:
                    queries[i].append(asked[i][0, 0])
            Projections.project_queries = plain
        for i in layers:
            keys[i].append(np.array(caches[i].index_keys[0, 0].astype(mx.float32)))
        print(f"read {n * TEXT:,} tokens", flush=True)
        if last:
            break
    return {i: (np.concatenate(keys[i])[-length:], mx.concatenate(queries[i])) for i in layers}


def measure(layer, text, keys, queries, top_k, forced):
    """Return the sets that a rule selects, and what that takes."""
    rule = make_rule("select", text).bind(layer)
    cache, T = FullKVCache(), len(keys)
    entries = mx.zeros((1, 1, T, 1))
    cache.append(entries, entries, mx.array(keys)[None, None])
    n_visible, added = mx.array([T]), None
    if text != EXACT:
        start = time.perf_counter()
        rule._index(cache, T - 1 - forced[1])
        added = (time.perf_counter() - start) / T * 1e6
    found, times = [], []
    for query in queries:
        probe = Probe(query[None, None, None], mx.ones((1, 1, 1)))
        start = time.perf_counter()
        slots = rule.select(probe, cache, top_k, n_visible, T, forced)
        mx.eval(slots)
        times.append((time.perf_counter() - start) * 1e3)
        found.append(set(np.array(slots).ravel().tolist()))
    return found, {"add_us": added, "select_ms": statistics.median(times)}


def draw(rows, plt):
    figure, (times, recall) = plt.subplots(1, 2, figsize=(11, 4.5))
    for setting in SETTINGS:
        there = sorted({r["length"] for r in rows if r["rule"] == setting})
        mean = [
            [statistics.mean(r[what] for r in rows if (r["rule"], r["length"]) == (setting, n)) for n in there]
            for what in ("select_ms", "recall")
        ]
        times.plot(there, mean[0], "o-", label=setting)
        recall.plot(there, mean[1], "o-", label=setting)
    lengths = sorted({r["length"] for r in rows})
    times.set(xscale="log", yscale="log", xlabel="entries", ylabel="ms to select for one query")
    recall.set(xscale="log", xlabel="entries", ylabel="share of the exact rule's entries")
    for axis in (times, recall):
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.set_xticks([], minor=True)
    times.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="books, as JSON lines with 'text'")
    parser.add_argument("out", type=Path)
    parser.add_argument("--indexer", default="weights/tiny-projections")
    parser.add_argument("--lengths", default="4096,16384,65536,262144")
    parser.add_argument("--layers", default="1,6")
    parser.add_argument("--top-k", type=int, default=256)
    args = parser.parse_args()
    lengths, layers = ([int(n) for n in x.split(",")] for x in (args.lengths, args.layers))
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "hnsw.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(r["rule"], r["length"], r["layer"]) for r in rows}
    subject = load_preset("tiny", indexer=args.indexer, select=EXACT)
    config = dict(select=EXACT, cache="full", prefill="dense", top_k=args.top_k, n_recent=32)
    with patch_sparse_generate(subject.model, subject.indexers, **config) as patch:
        found = vectors(subject, args.data, layers, max(lengths))
        forced = patch.config.n_sink, patch.config.n_recent
    bound = family_of(subject.model).layers(subject.model)
    for length in lengths:
        for i in layers:
            keys, queries = found[i][0][-length:], found[i][1]
            exact, took = measure(bound[i], EXACT, keys, queries, args.top_k, forced)
            for rule in SETTINGS:
                if (rule, length, i) in done:
                    continue
                got = (exact, took) if rule == EXACT else measure(bound[i], rule, keys, queries, args.top_k, forced)
                shares = [len(a & b) / len(b) for a, b in zip(got[0], exact)]
                rows.append({"rule": rule, "length": length, "layer": i, "recall": statistics.mean(shares), **got[1]})
                names = ("mlx", "usearch", "mlx-dsa")
                result = {"top_k": args.top_k, "versions": {n: package_version(n) for n in names}, "rows": rows}
                file.write_text(json.dumps(result, indent=1) + "\n")
                print(rows[-1], flush=True)
    save_picture(lambda plt: draw(rows, plt), args.out / "hnsw.png")


if __name__ == "__main__":
    main()
