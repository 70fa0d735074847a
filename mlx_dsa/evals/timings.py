"""How long reading and writing take under each policy, and the bytes of an entry of its cache."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from time import perf_counter

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..families import family_of
from ..presets import Preset
from ..tasks.documents import Document, load_documents, windows_of
from .cache_memory import computed_bytes
from .evaluator import Evaluator, Progress, Result, Row, register
from .generation import read
from .policies import Policy
from .report.plots import plot_timing
from .report.tables import timing_table
from .running.runner import Summary, Unit, World, evaluate
from .subject import check_lengths, describe, policies_config


def timing(
    subject: Preset,
    policies: Sequence[Policy],
    *,
    length: int = 4096,
    steps: int = 64,
    repeats: int = 3,
    data: str | None = None,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Time one text read and some tokens written after it.

    What the machine does beside it counts too: compare within a run on one machine that is idle.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        length (int): tokens of the text. Default: ``4096``.
        steps (int): tokens written. Default: ``64``.
        repeats (int): times that it is done, after once that does not count. Default: ``3``.
        data (str): the text, as `load_documents` takes it. Default: ``None``, bundled books.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result. Its `value` is the median of milliseconds a step, `low` and `high` the least
        and the most; `read_ms` milliseconds for 1,000 tokens of the prompt, what its end drops
        included; `entry_bytes` bytes that an entry takes in a layer, by arithmetic, as the mean of
        layers, `None` where it is quantised.
    """
    for what, value in (("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"[timing] '{what}' must be at least 1 but got {value}.")
    check_lengths("timing", subject, [length + steps], policies=policies, written=steps)
    window = windows_of(_joined(data), subject.tokenizer, length, length, 1)[0]
    config = {
        **describe(subject, name),
        "length": length,
        "steps": steps,
        "repeats": repeats,
        "data": data or "bundled books",
        "policies": policies_config(policies, subject.indexers),
    }
    units = [Unit(p.label, p) for p in policies]

    def work(policy: Policy) -> list[Row]:
        return [_measure(subject, policy, window["ids"], steps, repeats)]

    def summarise(records: list[Row]) -> Summary:
        return records, [], []

    return evaluate("timing", config, units, work, summarise, out=out, world=world, progress=progress)


def _joined(data: str | None) -> list[Document]:
    texts = load_documents(data)
    return [type(texts[0])("all", "\n\n".join(d.text for d in texts))]


def _measure(subject: Preset, policy: Policy, ids: list[int], steps: int, repeats: int) -> Row:
    model, found = subject.model, []
    with policy.apply(subject):
        for _ in range(repeats + 1):
            mx.clear_cache()
            caches = make_prompt_cache(model)
            start = perf_counter()
            logits = read(model, mx.array([ids]), caches)
            mx.eval([c.state for c in caches])
            middle = perf_counter()
            for _ in range(steps):
                logits = model(mx.argmax(logits, axis=-1)[:, None], cache=caches)[:, -1]
                mx.eval(logits)
            found.append((middle - start, perf_counter() - middle))
        held = [caches[i] for i in family_of(model).layers(model)]
        n_entries = sum(c.size() for c in held)
        itemsize = held[0].keys.dtype.size
    total = computed_bytes(subject, policy, len(ids) + steps, itemsize)
    read_s, wrote_s = (list(times) for times in zip(*found[1:]))
    step_ms = [1e3 * s / steps for s in wrote_s]
    return {
        "policy": policy.label,
        "top_k": policy.top_k,
        "length": len(ids),
        "n": repeats,
        "value": statistics.median(step_ms),
        "low": min(step_ms),
        "high": max(step_ms),
        "read_ms": 1e6 * statistics.median(read_s) / len(ids),
        "entry_bytes": None if total is None else total / n_entries,
    }


register(Evaluator("timing", timing, timing_table, plot_timing))
