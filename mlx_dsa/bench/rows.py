"""Decode of several conversations at once: dense mlx-lm against sparse, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..config import SparseConfig
from ..families import family_of
from ..indexer import Indexer
from ..patch import patch_sparse_generate
from .end_to_end import KINDS, check_contexts

# Steps before the first that counts: in them the rows become one batch.
_WARM_UP = 8


def bench_rows(
    model: nn.Module,
    indexers: Mapping[int, Indexer],
    config: SparseConfig,
    contexts: Iterable[int],
    rows: Iterable[int],
    *,
    repeats: int = 3,
    steps: int = 256,
    chunk: int = 2048,
    beside_dense: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """Time steps of decode of mlx-lm's ``BatchGenerator``.

    One prompt of random tokens is read, and every row goes on from a copy of its cache.

    Args:
        model (nn.Module): An unpatched model of mlx-lm.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How the sparse passes run.
        contexts (iterable of int): Tokens that each row has seen.
        rows (iterable of int): Rows of a batch.
        repeats (int): Passes of each kind. Default: ``3``.
        steps (int): Steps that count. Default: ``256``, in which each row plans evictions once.
        chunk (int): Tokens of the prompt that are read at once. Default: ``2048``.
        beside_dense (bool): Whether there are dense passes. Default: ``True``.
        clock (callable): Seconds. Default: ``time.perf_counter``.
        report (callable): Takes each pass as it is measured, as a dict.
        progress (callable): Takes passes done, their number, and what runs.

    Returns:
        iterator of dict: For each context and number of rows ``dense`` and ``sparse`` with
        medians (``decode_ms`` of a step of all rows, ``tokens_s`` of all, ``active_memory_gb``,
        ``peak_memory_gb``), and ``speedup``.

    Raises:
        ValueError: If a context is too short or too long for the model.
    """
    contexts, rows = list(contexts), list(rows)
    check_contexts(contexts, steps, model)
    kinds = KINDS if beside_dense else KINDS[1:]
    total, done = len(kinds) * repeats * len(contexts) * len(rows), 0
    for context in contexts:
        prompt = mx.random.randint(0, family_of(model).args(model).vocab_size, (context,))
        for n in rows:
            passes: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for repeat in range(repeats):
                for kind in kinds:
                    progress(done, total, f"{n} rows of {context:,} tokens: {kind}")
                    dense = kind == "dense"
                    patched = nullcontext() if dense else patch_sparse_generate(model, indexers, **vars(config))
                    with patched:
                        line = _time(model, prompt, n, steps, chunk, clock)
                    passes[kind].append(line)
                    report({"context": context, "rows": n, "kind": kind, "repeat": repeat} | line)
                    done += 1
            progress(done, total, "")
            row: dict[str, Any] = {"context": context, "rows": n}
            for kind, lines in passes.items():
                row[kind] = {name: median(line[name] for line in lines) for name in lines[0]}
            if beside_dense:
                row["speedup"] = row["dense"]["decode_ms"] / row["sparse"]["decode_ms"]
            yield row


def _time(model, prompt, n, steps, chunk, clock) -> dict[str, float]:
    cache = make_prompt_cache(model)
    for _ in generate_step(prompt, model, max_tokens=0, prompt_cache=cache, prefill_step_size=chunk):
        pass
    batch = BatchGenerator(model, completion_batch_size=n, prefill_batch_size=n)
    batch.insert([[0]] * n, [steps + 2 * _WARM_UP] * n, caches=[copy.deepcopy(cache) for _ in range(n)])
    del cache
    for _ in range(_WARM_UP):
        batch.next_generated()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    start = clock()
    for _ in range(steps):
        batch.next_generated()
    took = clock() - start
    batch.close()
    return {
        "decode_ms": 1e3 * took / steps,
        "tokens_s": n * steps / took,
        "active_memory_gb": mx.get_active_memory() / 1e9,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }
