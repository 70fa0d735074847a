"""Does the indexer select the keys that the attention really looks at?

The dense model reads a text. At some positions each layer's true attention is computed, and what
share of it a selection of K keys covers: the indexer's, three others of the same size, and those of
other rules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..cache import FullKVCache
from ..checkpoint_file import LIGHTNING
from ..chunks import chunk_size
from ..families import Layer, family_of
from ..ops import index_scores
from ..presets import Preset
from ..rules import Probe, kind_of, make_rule
from ..tasks.documents import load_documents, windows_of
from .each_rule import SELECT, rules_alone
from .evaluator import Evaluator, Progress, Result, Row, register
from .fidelity import coverage, selection_mask, slots_mask, true_attention
from .report.overview import mass_cell
from .report.plots import plot_retrieval
from .report.stats import bootstrap
from .report.tables import retrieval_pairs, retrieval_table
from .running.runner import Summary, Unit, World, evaluate
from .subject import check_lengths, describe, fingerprint
from .wrapping import wrapping

METHODS = ("index", "random", "window", "attention")
_NO_INDEXER = METHODS[1:]
_Forced = dict[int, tuple[int, int]]  # K -> sinks and recent keys


def retrieval(
    subject: Preset,
    *,
    top_k: Sequence[int],
    length: int = 4096,
    queries: int = 64,
    select: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = 4,
    seed: int = 0,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Compare selections with the true attention, by layer and K.

    Args:
        subject (Preset): the model with its tokenizer, indexers and config (sinks and recent keys).
        top_k (list of int): the sweep of K.
        length (int): tokens of a text. Default: ``4096``.
        queries (int): positions a text, evenly from the smallest K on. Default: ``64``.
        select (list of str): rules of selecting to measure too, as settings name them; ``["*"]`` is
            every one that has the indexers that it reads. In the result they are policies such as
            "select:oracle". Default: ``()``.
        data (str): as `load_documents` takes it. Default: ``None``, the bundled books.
        limit (int): texts. Default: ``4``.
        seed (int): of the random selection and the bootstrap. Default: ``0``.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result. A query counts for a K if it sees at least K keys; the policy "index" in it
        is the indexer's selection. It is not there where the model has no indexers.

    Raises:
        ValueError: if no query sees so many keys, or a rule is none.
    """
    kinds = {kind_of(x) for x in subject.indexers.values() if x is not None}
    rules = tuple(select)
    if rules == ("*",):  # every one that has what it reads
        rules = tuple(n for n in rules_alone("select") if _has_what_it_reads(n, kinds))
    for rule in rules:
        if not _has_what_it_reads(rule, kinds):
            raise ValueError(f"[retrieval] select {rule!r} reads indexers, and there are none of its kind.")
    check_lengths("retrieval", subject, [length])
    usable = sorted({k for k in top_k if k <= length})
    if not usable:
        raise ValueError(
            f"[retrieval] no query of {length:,} tokens sees K = {min(top_k, default=0)} keys. Use a smaller "
            f"--top-k or longer --lengths."
        )
    # Sinks and recent keys never take more than three quarters of a small K.
    forced = {k: (min(subject.config.n_sink, k // 4), min(subject.config.n_recent, k // 2)) for k in usable}
    windows = windows_of(load_documents(data), subject.tokenizer, length, length, limit)
    config = {
        **describe(subject, name),
        "top_k": usable,
        "length": length,
        "queries": queries,
        "n_sink": subject.config.n_sink,
        "n_recent": subject.config.n_recent,
        "data": data or "bundled books",
        "seed": seed,
        "windows": fingerprint([w["ids"] for w in windows]),
        **({"select": list(rules)} if rules else {}),
    }
    positions = np.unique(np.linspace(usable[0] - 1, length - 1, queries).astype(int))
    units = [Unit(f"window {i}", window) for i, window in enumerate(windows)]

    def work(window: dict[str, Any]) -> list[Row]:
        return _measure(subject, window, positions, forced, rules, seed)

    def summarise(records: list[Row]) -> Summary:
        return _rows(records, seed), _pairs(records, seed), records

    return evaluate("retrieval", config, units, work, summarise, out=out, world=world, progress=progress)


def _has_what_it_reads(name: str, kinds: set[str]) -> bool:
    rule = make_rule("select", name)
    return not rule.wants_indexer or rule.reads in kinds


class _Recorder(nn.Module):
    """A dense attention layer that measures selections at some positions as it goes."""

    def __init__(
        self, layer: Layer, indexer: Any, positions: np.ndarray, forced: _Forced, rules: Sequence[str], seed: int
    ) -> None:
        super().__init__()
        self.attention, self.indexer, self.layer = layer.module, _lightning(indexer), layer
        self.positions, self.forced, self.seed = positions, forced, seed
        # What the runtime would hold for each rule of selecting: its own cache.
        self.rules = {name: make_rule("select", name).bind(layer, indexer) for name in rules}
        self.caches = {name: FullKVCache() for name in rules}
        self.index_keys: Any = None
        self.found: list[tuple[int, str, mx.array, mx.array]] = []

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        offset = cache.offset
        for rule in self.rules.values():
            rule.begin()
        output = self.attention(x, mask, cache)
        if self.indexer is not None:
            keys = self.indexer.project_keys(x, offset)
            self.index_keys = keys if self.index_keys is None else mx.concatenate([self.index_keys, keys], axis=2)
            mx.eval(self.index_keys)
        keys, values = (entries[:, :, : cache.offset] for entries in (cache.keys, cache.values))
        for name, held in self.caches.items():
            new = (entries[:, :, offset:] for entries in (keys, values))
            held.append(*new, self.rules[name].entry(x, offset))
            mx.eval(held.contents)
        here = self.positions[(self.positions >= offset) & (self.positions < offset + x.shape[1])]
        if len(here):
            self._measure(x, offset, here, keys)
        return output

    def _measure(self, x: mx.array, offset: int, here: np.ndarray, keys: mx.array) -> None:
        rows = mx.array(here - offset)
        positions = mx.array(here)
        queries = self.layer.project(x, offset).queries
        logits, probabilities = true_attention(queries[0][:, rows], keys[0], positions, self.layer.scale)
        scores = mx.zeros((len(here), keys.shape[2]))
        if self.indexer is not None:
            index_queries, weights = self.indexer.project_queries(x, offset)
            scores = index_scores(index_queries[:, :, rows], weights[:, rows], self.index_keys)[0]
        slots = mx.broadcast_to(mx.arange(keys.shape[2], dtype=mx.float32), scores.shape)
        key = mx.random.key(self.seed * 1_000_003 + self.layer.index * 1009 + offset)
        probes = {name: rule.probe(x, offset, queries) for name, rule in self.rules.items()}
        for k, always in self.forced.items():
            use = np.flatnonzero(here + 1 >= k)
            if not len(use):
                continue
            take = mx.array(use)
            chosen = {
                "index": (scores, always),
                "random": (mx.random.uniform(shape=scores.shape, key=key), always),
                "window": (slots, always),
                "attention": (probabilities.sum(axis=0), (0, 0)),
            }
            masks = {
                method: selection_mask(worth[take], k, positions[take], *kept)
                for method, (worth, kept) in chosen.items()
                if method in _methods(self.indexer)
            }
            for name, rule in self.rules.items():
                probe, at = probes[name], rows[take]
                seen, end = positions[take] + 1, int(here[use[-1]]) + 1
                if rule.together:  # the others are asked, too
                    seen, end = mx.arange(offset + 1, offset + x.shape[1] + 1), offset + x.shape[1]
                else:
                    probe = Probe(probe.queries[:, :, at], probe.weights[:, at])
                picked = rule.select(probe, self.caches[name], k, seen, end, always)
                picked = picked[..., at, :] if rule.together else picked
                masks[SELECT + name] = slots_mask(picked[0], keys.shape[2])
            for method, mask in masks.items():
                recall, mass = coverage(mask, logits[:, take], probabilities[:, take], k)
                self.found.append((k, method, recall, mass))
        mx.eval(self.found)  # all at once: each wait for a GPU costs


def _methods(indexer: Any) -> tuple[str, ...]:
    return METHODS if _lightning(indexer) is not None else _NO_INDEXER


def _lightning(indexer: Any) -> Any:
    """Return an indexer if it is a lightning indexer, else ``None``."""
    return indexer if kind_of(indexer) == LIGHTNING else None


def _measure(
    subject: Preset, window: dict[str, Any], positions: np.ndarray, forced: _Forced, rules: Sequence[str], seed: int
) -> list[Row]:
    model = subject.model
    ids = mx.array([window["ids"]])
    family = family_of(model)
    layers = family.layers(model)
    recorders = {
        i: _Recorder(layers[i], indexer and indexer.bind(layers[i]), positions, forced, rules, seed)
        for i, indexer in sorted(subject.indexers.items())
    }
    for name in rules:
        before = None
        for recorder in recorders.values():
            recorder.rules[name].follow(before)
            before = recorder.rules[name]
    with wrapping(model, recorders):
        caches = make_prompt_cache(model)
        for start in range(0, ids.shape[1], chunk_size()):
            family.hidden(model, ids[:, start : start + chunk_size()], caches)
            mx.eval([c.state for c in caches])
    records = []
    for layer, recorder in recorders.items():
        for k in forced:
            for method in (*_methods(recorder.indexer), *(SELECT + name for name in rules)):
                found = [f[2:] for f in recorder.found if f[:2] == (k, method)]
                recall, mass = (np.concatenate([np.array(x) for x in part], axis=1) for part in zip(*found))
                records.append(
                    {
                        "item": f"{window['document']}@{window['start']}",
                        "hash": fingerprint(window["ids"]),
                        "policy": method,
                        "layer": layer,
                        "top_k": k,
                        "n": recall.shape[1],
                        # One sum a head, over the queries.
                        "recall": recall.sum(axis=1).round(6).tolist(),
                        "mass": mass.sum(axis=1).round(6).tolist(),
                    }
                )
    return records


def _found(records: list[Row]) -> list[str]:
    """Return the selections of a result in order."""
    return list(dict.fromkeys(r["policy"] for r in records))


def _rows(records: list[Row], seed: int) -> list[Row]:
    rows = []
    layers = sorted({r["layer"] for r in records})
    for k in sorted({r["top_k"] for r in records}):
        for method in _found(records):
            mine = [r for r in records if (r["top_k"], r["policy"]) == (k, method)]
            rows.append({"policy": method, "top_k": k, "layer": None, **_row(mine, seed)})
            rows += [
                {
                    "policy": method,
                    "top_k": k,
                    "layer": layer,
                    **_row([r for r in mine if r["layer"] == layer], seed),
                }
                for layer in layers
            ]
    return rows


def _row(records: list[Row], seed: int) -> Row:
    """Return mean recall and mass with the worst head; `value` is the recall."""
    row = {"n": sum(r["n"] for r in records if r["layer"] == records[0]["layer"])}
    for metric in ("recall", "mass"):
        mean, low, high = bootstrap(*zip(*_texts(records, metric)), seed=seed)
        heads: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for r in records:
            for head, total in enumerate(r[metric]):
                heads.setdefault((r["layer"], head), []).append((total, r["n"]))
        worst = min(sum(t for t, _ in h) / sum(n for _, n in h) for h in heads.values())
        found = {"value": mean, "low": low, "high": high, "worst": worst}
        row.update(found if metric == "recall" else {f"mass_{k}": v for k, v in found.items()})
    return row


def _texts(records: list[Row], metric: str) -> list[tuple[float, int]]:
    """Add up over the heads, layers and queries of each text."""
    totals: dict[str, tuple[float, int]] = {}
    for r in records:
        before = totals.get(r["item"], (0.0, 0))
        totals[r["item"]] = (before[0] + sum(r[metric]), before[1] + r["n"] * len(r[metric]))
    return list(totals.values())


def _pairs(records: list[Row], seed: int) -> list[Row]:
    """Compare the indexer's recall with the other selections', text by text."""
    pairs: list[Row] = []
    methods = _found(records)
    if "index" not in methods:
        return pairs
    for k in sorted({r["top_k"] for r in records}):
        by = {m: _texts([r for r in records if (r["top_k"], r["policy"]) == (k, m)], "recall") for m in methods}
        for method in methods[1:]:
            differences = [a - b for (a, _), (b, _) in zip(by["index"], by[method])]
            mean, low, high = bootstrap(differences, [n for _, n in by[method]], seed=seed)
            pairs.append(
                {"policy": "index", "against": method, "top_k": k, "texts": len(differences)}
                | {"difference": mean, "low": low, "high": high}
            )
    return pairs


register(
    Evaluator(
        "retrieval",
        retrieval,
        retrieval_table,
        plot_retrieval,
        pairs=retrieval_pairs,
        cell=mass_cell,
        takes_policies=False,
    )
)
