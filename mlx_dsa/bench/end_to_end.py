"""Dense mlx-lm against sparse attention on the same prompts, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..config import SparseConfig
from ..families import family_of, positions_of
from ..indexer import Indexer
from ..patch import SparsePatch, patch_sparse_generate

KINDS = ("dense", "sparse")
# Steps of decode that are timed as one: all that a cache does for several at once is in it.
_BLOCK = 256
# Steps of decode before the first that counts.
_WARM_UP = 8


class Pass(NamedTuple):
    """What one prompt and the steps after it took.

    Args:
        prefill_s (float): Seconds to read all of the prompt but its last token.
        ttft_s (float): Seconds to the first token.
        decode_ms (tuple of float): Milliseconds a token, one mean a block of steps.
        active_memory_gb (float): GB (1e9 bytes) in use at the end.
        peak_memory_gb (float): The most GB in use at once.
    """

    prefill_s: float
    ttft_s: float
    decode_ms: tuple[float, ...]
    active_memory_gb: float
    peak_memory_gb: float


def check_contexts(contexts: Iterable[int], steps: int, model: nn.Module):
    """Raise unless a model has positions for every context and the steps after it.

    Args:
        contexts (iterable of int): Tokens of the prompts.
        steps (int): Steps of decode that are timed, rounded up to blocks of 256.
        model (nn.Module): The model.

    Raises:
        ValueError: If a context is too short or too long.
    """
    positions = positions_of(model)
    after = _tokens_after(_in_blocks(steps))
    for context in contexts:
        if context < 2:
            raise ValueError(f"[bench] 'contexts' must be at least 2 but got {context}.")
        if positions is not None and context + after > positions:
            raise ValueError(
                f"[bench] 'contexts' must leave room for {after} steps in the "
                f"model's {positions:,} positions but got {context}."
            )


def _in_blocks(steps: int) -> int:
    return -(-steps // _BLOCK) * _BLOCK


def _tokens_after(steps: int) -> int:
    """Return how many tokens are fed after a prompt: mlx-lm runs one step ahead."""
    return _WARM_UP + steps + 1


def bench(
    model: nn.Module,
    indexers: Mapping[int, Indexer],
    config: SparseConfig,
    contexts: Iterable[int],
    *,
    repeats: int = 3,
    steps: int = 256,
    chunk: int = 2048,
    beside_dense: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """Time reading a prompt and the steps after it: dense and sparse in turns.

    Both are mlx-lm's ``generate_step`` on the same random tokens.

    Args:
        model (nn.Module): An unpatched model of mlx-lm.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How the sparse passes run.
        contexts (iterable of int): Tokens of the prompts.
        repeats (int): Passes of each kind. Default: ``3``.
        steps (int): Steps of decode that count, rounded up to blocks of 256.
          Default: ``256``.
        chunk (int): Tokens of the prompt that are read at once. Default: ``2048``.
        beside_dense (bool): Whether there are dense passes; without them a row has no
          ``dense``, no ``speedup`` and no ``peak_memory_ratio``. Default: ``True``.
        clock (callable): Seconds. Default: ``time.perf_counter``.
        report (callable): Takes each pass as it is measured, as a dict.
        progress (callable): Takes passes done, their number, and what runs.

    Returns:
        iterator of dict: For each context ``dense`` and ``sparse`` with medians
        (``prefill_s``, ``prefill_tokens_s``, ``ttft_s``, ``decode_ms``,
        ``active_memory_gb``, ``peak_memory_gb``), and ``speedup`` (``prefill``,
        ``ttft``, ``decode``).

    Raises:
        ValueError: If a context is too short or too long for the model.
    """
    contexts = list(contexts)
    steps = _in_blocks(steps)
    check_contexts(contexts, steps, model)
    unused = _nbytes(indexers)  # not of a dense model, but in memory beside it
    kinds = KINDS if beside_dense else KINDS[1:]
    total = len(kinds) * repeats * len(contexts)
    done = 0
    for context in contexts:
        prompt = mx.random.randint(0, family_of(model).args(model).vocab_size, (context,))
        mx.eval(prompt)
        run = _Runner(model, indexers, config, chunk, clock)
        progress(done, total, f"{context:,} tokens: warming up")
        for kind in kinds:
            run(kind, prompt[: run.warm_up_tokens()], 0)
        passes: dict[str, list[Any]] = {kind: [] for kind in kinds}
        for repeat in range(repeats):
            for kind in kinds:
                progress(done, total, f"{context:,} tokens: {kind}")
                result = run(kind, prompt, steps)
                if kind == "dense":
                    result = _without(result, unused / 1e9)
                passes[kind].append(result)
                report({"context": context, "kind": kind, "repeat": repeat} | result._asdict())
                done += 1
        progress(done, total, "")
        yield _row(context, run.prefill, passes)


class _Runner:
    """Run passes of one model."""

    def __init__(self, model, indexers, config, chunk, clock):
        self._model = model
        self._indexers = indexers
        self._config = config
        self._chunk = chunk
        self._clock = clock
        with self._patched("sparse") as patch:
            self._config = patch.config  # with what "auto" takes
            layer = next(iter(patch.layers.values()))
            self.prefill = {"mode": layer.prefill, "dense_until": layer.dense_until}

    def warm_up_tokens(self) -> int:
        """Return how long a prompt passes through all that a longer one does."""
        config = self._config
        between_cuts = 2 * config.stream_chunk if config.prefill == "stream" else 0
        longest = max(self.prefill["dense_until"], config.top_k)
        return 2 * longest + max(self._chunk, between_cuts)

    def _patched(self, kind) -> SparsePatch | nullcontext:
        if kind == "dense":
            return nullcontext()
        return patch_sparse_generate(self._model, self._indexers, **vars(self._config))

    def __call__(self, kind: str, prompt: mx.array, steps: int) -> Pass:
        with self._patched(kind):
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            return self._time(make_prompt_cache(self._model), prompt, steps)

    def _time(self, cache, prompt, steps) -> Pass:
        read = None

        def watch(done, total):
            nonlocal read
            if done == total - 1:
                read = self._clock()

        start = self._clock()
        tokens = generate_step(
            prompt,
            self._model,
            max_tokens=_tokens_after(steps),
            prompt_cache=cache,
            prefill_step_size=self._chunk,
            prompt_progress_callback=watch,
        )
        next(tokens)
        first = self._clock()
        for _ in range(_WARM_UP):
            next(tokens)
        ends = [self._clock()]
        for _ in range(0, steps, _BLOCK):
            for _ in range(_BLOCK):
                next(tokens)
            ends.append(self._clock())
        decode = (1e3 * (b - a) / _BLOCK for a, b in zip(ends, ends[1:]))
        result = Pass(
            read - start,
            first - start,
            tuple(decode),
            mx.get_active_memory() / 1e9,
            mx.get_peak_memory() / 1e9,
        )
        tokens.close()
        return result


def _row(context, prefill, passes) -> dict[str, Any]:
    row = {"context": context, "prefill": prefill}
    for kind, results in passes.items():
        prefill_s = median(r.prefill_s for r in results)
        row[kind] = {
            "prefill_s": prefill_s,
            "prefill_tokens_s": (context - 1) / prefill_s,
            "ttft_s": median(r.ttft_s for r in results),
            "decode_ms": median(ms for r in results for ms in r.decode_ms),
            "active_memory_gb": median(r.active_memory_gb for r in results),
            "peak_memory_gb": median(r.peak_memory_gb for r in results),
        }
    if "dense" not in row:
        return row
    dense, sparse = row["dense"], row["sparse"]
    row["speedup"] = {
        name: dense[key] / sparse[key]
        for name, key in (
            ("prefill", "prefill_s"),
            ("ttft", "ttft_s"),
            ("decode", "decode_ms"),
        )
    }
    row["peak_memory_ratio"] = sparse["peak_memory_gb"] / dense["peak_memory_gb"]
    return row


def _without(result: Pass, gigabytes: float) -> Pass:
    return result._replace(
        active_memory_gb=result.active_memory_gb - gigabytes,
        peak_memory_gb=result.peak_memory_gb - gigabytes,
    )


def _nbytes(indexers: Mapping[int, Indexer]) -> int:
    return sum(tree_reduce(lambda total, a: total + a.nbytes, i.parameters(), 0) for i in indexers.values())
