"""What the cache takes, and the whole program, by the length of the context."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..families import family_of
from ..presets import Preset
from ..rules import make_rule
from ..tasks.documents import load_documents, windows_of
from .evaluator import Evaluator, Progress, Result, Row, register
from .generation import read
from .policies import Policy
from .report.plots import plot_memory
from .report.tables import memory_pairs, memory_table
from .running.runner import Summary, Unit, World, evaluate
from .subject import check_lengths, describe, policies_config

_STEPS = 8


def memory(
    subject: Preset,
    policies: Sequence[Policy],
    *,
    lengths: Sequence[int],
    haystack: str | None = None,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Read contexts, write a few tokens, and note what it took.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        lengths (list of int): tokens of the contexts.
        haystack (str): the text, as `load_documents` takes it. Default: ``None``, bundled books.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result; its `value` is the bytes of the cache after a few tokens were written,
        `computed` the same by arithmetic, `active_gb` and `peak_gb` those of the whole program.
    """
    totals = [length + _STEPS for length in lengths]
    check_lengths("memory", subject, totals, policies=policies, written=_STEPS)
    texts = load_documents(haystack)
    texts = [type(texts[0])("all", "\n\n".join(d.text for d in texts))]
    ids = windows_of(texts, subject.tokenizer, max(lengths), max(lengths), 1)[0]["ids"]
    config = {
        **describe(subject, name),
        "lengths": list(lengths),
        "steps": _STEPS,
        "policies": policies_config(policies, subject.indexers),
    }
    units = [Unit(f"{p.label}/{length}", (p, length)) for p in policies for length in lengths]

    def work(payload: tuple[Policy, int]) -> list[Row]:
        policy, length = payload
        return [_measure(subject, policy, ids[:length])]

    def summarise(records: list[Row]) -> Summary:
        return records, _pairs(records), []

    return evaluate("memory", config, units, work, summarise, out=out, world=world, progress=progress)


def computed_bytes(subject: Preset, policy: Policy, length: int, itemsize: int) -> int | None:
    """Return the bytes of a cache's entries after `length` tokens, by arithmetic.

    A layer without attention counts for nothing. A dense layer keeps every key and value. A sparse
    layer has an index key for each entry besides; with a budget also the retention head's two scores
    (4 bytes each), if there is a head, and, once it has evicted, the entries' positions (4 bytes
    each) and their numbers, if these are others (4 more, and in 16 bits the keys as they were first
    rotated, with 4 bytes each). What waits to be scored, up to 64 hidden states a layer, is not
    counted. ``None`` for a tiered cache, whose cold entries are quantised.
    """
    config, total = policy.config, 0
    keeps_score = config and make_rule("evict", config.evict).keeps_score
    if config and config.cache == "tiered":
        return None
    before = None
    for i, layer in family_of(subject.model).layers(subject.model).items():
        entry = 2 * layer.n_kv_heads * layer.head_dim * itemsize
        if config is None or i not in subject.indexers or i in config.dense_layers:
            total += length * entry
            continue
        indexer = subject.indexers[i]
        selecting = make_rule("select", config.select).bind(layer, indexer)
        selecting.follow(before)
        before = selecting
        sparse = entry + selecting.entry_width() * itemsize
        if config.cache == "full":
            total += length * sparse
            continue
        if keeps_score and (not config.wants_heads or indexer.has_retention):
            sparse += 8
        places = 4 * layer.n_kv_heads if config.evicts_by_head else 4
        if config.positions == "compact":
            places += 4 + (entry // 2 if itemsize < 4 else 0)
        total += length * sparse if length <= config.top_k else config.top_k * (sparse + places)
    return total


def _measure(subject: Preset, policy: Policy, ids: list[int]) -> Row:
    model = subject.model
    mx.clear_cache()
    mx.reset_peak_memory()
    with policy.apply(subject):
        caches = make_prompt_cache(model)
        logits = read(model, mx.array([ids]), caches)
        for _ in range(_STEPS):
            token = mx.argmax(logits, axis=-1)
            logits = model(token[:, None], cache=caches)[:, -1]
            mx.eval(logits)
        # The room for states that wait to be scored is taken some steps later, or by this.
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        length = len(ids) + _STEPS
        return {
            "policy": policy.label,
            "top_k": policy.top_k,
            "length": len(ids),
            "n": 1,
            "value": sum(c.nbytes for c in caches),
            "computed": computed_bytes(subject, policy, length, caches[0].keys.dtype.size),
            "entries": [c.size() for c in caches],
            "active_gb": round(mx.get_active_memory() / 1e9, 4),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 4),
        }


def _pairs(records: list[Row]) -> list[Row]:
    dense = {r["length"]: r["value"] for r in records if r["policy"] == "dense"}
    return [
        {
            "policy": r["policy"],
            "against": "dense",
            "length": r["length"],
            "ratio": r["value"] / dense[r["length"]],
        }
        for r in records
        if r["policy"] != "dense" and r["length"] in dense
    ]


register(Evaluator("memory", memory, memory_table, plot_memory, pairs=memory_pairs))
