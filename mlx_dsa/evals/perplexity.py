"""Perplexity where sparsity is at work: only tokens that have more than top_k before them count.

Two paths. "prefill" reads a window in chunks and scores its later tokens. "decode" reads a passage
as a prompt, which prunes the cache, and then feeds the following text token by token: the only one
in which a budget cache evicts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..chunks import chunk_size
from ..families import family_of
from ..presets import Preset
from ..tasks.documents import load_documents, windows_of
from .evaluator import Evaluator, Progress, Result, Row, register
from .generation import read
from .policies import DENSE, Policy, pairings
from .report.compare import nll_difference
from .report.overview import ppl_cell
from .report.plots import plot_ppl
from .report.stats import bootstrap
from .report.tables import ppl_pairs, ppl_table
from .running.runner import Summary, Unit, World, evaluate
from .subject import check_lengths, describe, fingerprint, policies_config

PATHS = ("prefill", "decode")
# Positions whose logits of two policies are compared at once: bounds memory for large vocabularies.
_BLOCK = 256
_Window = dict[str, Any]  # of windows_of
_States = Callable[[nn.Module, mx.array, int], mx.array]


def ppl(
    subject: Preset,
    policies: Sequence[Policy],
    *,
    length: int = 4096,
    stride: int | None = None,
    path: str = "prefill",
    decode_tokens: int = 256,
    buckets: int = 4,
    data: str | None = None,
    documents: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    compare: str | Sequence[str] = "dense",
    beside_dense: bool = True,
    context: int | None = None,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Measure how much worse a text is predicted when attention is sparse.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run; the dense model is run beside them.
        length (int): tokens of a window. Default: ``4096``.
        stride (int): tokens from one window's start to the next; where less than `length`, only the
            last `stride` tokens of a window are scored. Default: ``None``, `length`.
        path (str): "prefill" or "decode". Default: ``"prefill"``.
        decode_tokens (int): in "decode", tokens fed one by one after `length`. Default: ``256``.
        buckets (int): position buckets that are reported. Default: ``4``.
        data (str): as `load_documents` takes it. Default: ``None``, the bundled books.
        documents (int): take no more texts than that. Default: ``None``.
        limit (int): windows in all, spread evenly. Default: ``None``.
        batch_size (int): windows at once. Default: ``1``.
        seed (int): of the bootstrap. Default: ``0``.
        compare (str or list of str): what is compared with what, as in `pairings`, besides all
            with the dense model. Default: ``"dense"``.
        beside_dense (bool): whether the dense model is run too; not where a text is longer than
            its positions. Default: ``True``.
        context (int): in "decode", read only so many tokens before those that are fed: what the
            others are worth. Default: ``None``, all `length`.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result. Intervals are over documents, or windows where they are fewer than 8.
    """
    if path not in PATHS:
        raise ValueError(f"[ppl] 'path' must be prefill or decode but got {path!r}.")
    stride = stride or length
    if not 0 < stride <= length:
        raise ValueError(f"[ppl] 'stride' must be between 1 and length = {length} but got {stride}.")
    if context is not None and (path != "decode" or not 0 < context <= length):
        raise ValueError(
            f"[ppl] 'context' goes with path decode and is between 1 and length = {length} but got {context}."
        )
    fed = decode_tokens if path == "decode" else 0
    whole, seen = length + fed, (context or length) + fed
    read_by = [DENSE, *policies] if beside_dense else policies
    check_lengths("ppl", subject, [seen], "--lengths or --decode-tokens", read_by, fed)
    last = seen - 1 if path == "prefill" else context or length
    blind = [p for p in policies if p.top_k and p.top_k >= last]
    if blind and all(p.top_k is None or p in blind for p in policies):
        raise ValueError(
            f"[ppl] top_k = {blind[0].top_k} is no smaller than the context of {last} tokens: nothing would be "
            f"dropped. Use a smaller --top-k or longer --lengths."
        )
    windows = windows_of(load_documents(data, documents), subject.tokenizer, whole, stride, limit)
    # Where windows overlap, the last tokens of each are scored.
    first = max(1, seen - stride) if stride < length else 1
    if context is not None:
        windows = [{**w, "ids": w["ids"][length - context :]} for w in windows]
        length = context
    sparse = [p for p in policies if p.config is not None]
    config = {
        **describe(subject, name),
        "length": length,
        "stride": stride,
        "path": path,
        "decode_tokens": decode_tokens,
        "buckets": buckets,
        "data": data or "bundled books",
        "batch_size": batch_size,
        "seed": seed,
        "policies": policies_config(sparse, subject.indexers),
        "compare": compare,
        "windows": fingerprint([w["ids"] for w in windows]),
        **({} if beside_dense else {"beside_dense": False}),
        **({} if context is None else {"context": context}),
    }
    units = [Unit(f"windows {i}", windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
    hidden = _prefill_states if path == "prefill" else _decode_states

    def work(batch: list[_Window]) -> list[Row]:
        return _score(subject, sparse, batch, hidden, length, first, buckets, beside_dense)

    def summarise(records: list[Row]) -> Summary:
        rows, pairs = _tables(records, sparse, seed, beside_dense)
        return rows, pairs + _between(records, sparse, compare, seed), records

    return evaluate("ppl", config, units, work, summarise, out=out, world=world, progress=progress)


def _prefill_states(model: nn.Module, ids: mx.array, length: int) -> mx.array:
    """Return the hidden states `[B, L - 1, dim]` of all tokens but the last, read in chunks."""
    caches = make_prompt_cache(model)
    states = []
    edges = [*range(0, ids.shape[1] - 1, chunk_size()), ids.shape[1] - 1]
    if edges[-1] - edges[-2] == 1 and len(edges) > 2:
        del edges[-2]  # a token alone would end the prompt, and prune a budget cache
    for start, stop in zip(edges, edges[1:]):
        states.append(family_of(model).hidden(model, ids[:, start:stop], caches))
        mx.eval(states[-1], [c.state for c in caches])
    return mx.concatenate(states, axis=1)


def _decode_states(model: nn.Module, ids: mx.array, length: int) -> mx.array:
    """Return the hidden states of the tokens from `length` on but the last, fed one by one."""
    caches = make_prompt_cache(model)
    read(model, ids[:, :length], caches)
    states = []
    for at in range(length, ids.shape[1] - 1):
        states.append(family_of(model).hidden(model, ids[:, at : at + 1], caches))
        mx.eval(states[-1])
    return mx.concatenate(states, axis=1)


def _score(
    subject: Preset,
    policies: list[Policy],
    batch: list[_Window],
    hidden: _States,
    length: int,
    first: int,
    buckets: int,
    beside_dense: bool,
) -> list[Row]:
    """Return the records of a batch of windows: one a window and policy."""
    model = subject.model
    ids = mx.array([w["ids"] for w in batch])
    if beside_dense:
        with DENSE.apply(subject):
            dense = hidden(model, ids, length)
    records = []
    for policy in policies:
        with policy.apply(subject, None):
            states = hidden(model, ids, length)
        # The state at index i belongs to position `begin + i` and predicts the token after it.
        begin = ids.shape[1] - 1 - states.shape[1]
        # Position p sees p + 1 keys: more than top_k of them, or nothing was dropped. The decode
        # path drops from the prompt's end on.
        low = max(first - 1, policy.top_k or 0)
        skip = min(max(0, low - begin), states.shape[1] - 1)  # what doesn't count
        begin += skip
        states = states[:, skip:]
        read_by = [dense[:, skip:], states] if beside_dense else [states]
        scored = _compare(model, read_by, ids[:, begin + 1 :])
        records += [_record(policy, *of, begin, low, buckets) for of in zip(batch, scored)]
    return records


def _compare(model: nn.Module, read_by: list[mx.array], targets: mx.array) -> np.ndarray:
    """Return, for each row, an array `[4, L]`: NLL dense and sparse, KL, same top token; `[1, L]`,
    the NLL, where there are no states of the dense model."""
    parts = []
    for at in range(0, targets.shape[1], _BLOCK):
        found = []
        for states in read_by:
            logits = family_of(model).logits(model, states[:, at : at + _BLOCK]).astype(mx.float32)
            found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        target = targets[:, at : at + _BLOCK, None]
        scored = [-mx.take_along_axis(x, target, axis=-1)[..., 0] for x in found]
        if len(found) == 2:
            p, q = found
            scored.append((mx.exp(p) * (p - q)).sum(axis=-1))
            scored.append((mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).astype(mx.float32))
        parts.append(mx.stack(scored, axis=1))
        mx.eval(parts[-1])
    return np.array(mx.concatenate(parts, axis=2), dtype=np.float64)


def _record(policy: Policy, window: _Window, scored: np.ndarray, begin: int, low: int, buckets: int) -> Row:
    positions = np.arange(begin, begin + scored.shape[1])
    counts = positions >= low
    record = {
        "item": f"{window['document']}@{window['start']}",
        "hash": fingerprint(window["ids"]),
        "document": window["document"],
        "policy": policy.label,
        "n": int(counts.sum()),
        **_sums(scored[:, counts]),
        "buckets": [],
    }
    edges = np.linspace(max(low, begin), positions[-1] + 1, buckets + 1).astype(int)
    for start, stop in zip(edges, edges[1:]):
        inside = (positions >= start) & (positions < stop)
        place = {"from": int(start), "to": int(stop), "n": int(inside.sum())}
        record["buckets"].append({**place, **_sums(scored[:, inside])})
    return record


def _sums(scored: np.ndarray) -> dict[str, float]:
    names = ("nll",) if len(scored) == 1 else ("dense_nll", "nll", "kl", "same_top")
    return dict(zip(names, (float(x) for x in scored.sum(axis=1))))


def _tables(records: list[Row], policies: list[Policy], seed: int, beside_dense: bool) -> tuple[list[Row], list[Row]]:
    rows: list[Row] = []
    pairs: list[Row] = []
    for policy in policies:
        mine = [r for r in records if r["policy"] == policy.label]
        if not sum(r["n"] for r in mine):
            rows.append({"policy": policy.label, "top_k": policy.top_k, "n": 0, "value": None})
            continue
        row: Row = {"policy": policy.label, "top_k": policy.top_k, **_row(mine, "nll", seed)}
        if not beside_dense:
            rows.append({**row, "buckets": _buckets(mine)})
            continue
        rows.append({"policy": "dense", "beside": policy.label, **_row(mine, "dense_nll", seed)})
        n = row["n"]
        row["kl"] = sum(r["kl"] for r in mine) / n
        row["same_top"] = sum(r["same_top"] for r in mine) / n
        row["buckets"] = _buckets(mine)
        rows.append(row)
        pairs.append({"policy": policy.label, "against": "dense", **_pair(mine, seed)})
    return rows, pairs


def _between(records: list[Row], policies: list[Policy], compare: str | Sequence[str], seed: int) -> list[Row]:
    """Return the comparisons of policies with each other, where they score the same tokens."""
    pairs = []
    for policy, against in pairings(policies, compare):
        both = [[r for r in records if r["policy"] == label] for label in (policy, against)]
        if sum(r["n"] for r in both[0]) and all(a["n"] == b["n"] for a, b in zip(*both)):
            other = [{**a, "dense_nll": b["nll"]} for a, b in zip(*both)]
            pairs.append({"policy": policy, "against": against, **_pair(other, seed)})
    return pairs


def _row(records: list[Row], key: str, seed: int) -> Row:
    totals, unit = _totals(records, lambda r: (r[key], r["n"]))
    mean, low, high = bootstrap(*zip(*totals), seed=seed)
    return {
        "n": sum(r["n"] for r in records),
        unit: len(totals),
        "value": math.exp(mean),
        "low": _exp(low),
        "high": _exp(high),
    }


def _pair(records: list[Row], seed: int) -> Row:
    """Return the paired difference in NLL a token, and the ratio of perplexities that it is."""
    totals, unit = _totals(records, lambda r: (r["nll"] - r["dense_nll"], r["n"]))
    mean, low, high = bootstrap(*zip(*totals), seed=seed)
    return {
        "n": sum(r["n"] for r in records),
        unit: len(totals),
        "difference": mean,
        "low": low,
        "high": high,
        "ratio": math.exp(mean),
        "ratio_low": _exp(low),
        "ratio_high": _exp(high),
    }


def _exp(end: float | None) -> float | None:
    """Return an end of an interval as a perplexity; ``None`` where there is no interval."""
    return None if end is None else math.exp(end)


def _totals(records: list[Row], terms: Callable[[Row], tuple[float, int]]) -> tuple[list[tuple[float, int]], str]:
    """Add up over each document, or over each window where there are fewer than 8 documents.

    An interval over 2 books would say nothing. Returns the sums, and what they are over.
    """
    many = len({r["document"] for r in records}) >= 8
    totals: dict[str, tuple[float, int]] = {}
    for record in records:
        top, bottom = terms(record)
        key = record["document"] if many else record["item"]
        before = totals.get(key, (0.0, 0))
        totals[key] = (before[0] + top, before[1] + bottom)
    return list(totals.values()), "documents" if many else "windows"


def _buckets(records: list[Row]) -> list[Row]:
    found = []
    for same in zip(*(r["buckets"] for r in records)):
        n = sum(b["n"] for b in same)
        if n == 0:
            continue
        means = {"value": "nll", "dense": "dense_nll"}
        if "dense_nll" not in same[0]:
            del means["dense"]
        place = {"from": same[0]["from"], "to": same[0]["to"], "n": n}
        found.append(place | {k: math.exp(sum(b[of] for b in same) / n) for k, of in means.items()})
    return found


register(Evaluator("ppl", ppl, ppl_table, plot_ppl, pairs=ppl_pairs, difference=nll_difference, cell=ppl_cell))
