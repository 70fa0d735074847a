"""Find the lengths from which sparse attention is faster than dense, on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..attention import SparseAttention
from ..cache import FullKVCache, SparseKVCache, make_cache
from ..config import SparseConfig
from ..crossovers import CROSSING, describe, plan_prefill, store
from ..families import family_of, positions_of
from ..indexer import Indexer

# Layers that are timed together, so that what a call costs to start counts once.
_LAYERS = 4
# Keys seen by the longest measurement, as a multiple of top_k.
_LONGEST = 64
# A crossover is known to this share of the length before it.
_PRECISION = 1 / 4
_DECODE_STEPS = 32


def tune(
    model: nn.Module,
    indexers: Mapping[int, Indexer],
    config: SparseConfig,
    *,
    chunk: int = 2048,
    repeats: int = 3,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure where sparse prefill and decode begin to win, and store what was compared.

    Attention layers of the model are timed on random keys: a chunk of a prompt, dense
    and sparse in turns, and steps of decode. Lengths double from ``2 * top_k`` until each
    way wins, then the crossover is bisected. A way is stored where it won, or lost to
    the end of the search, at two lengths or more.

    Args:
        model (nn.Module): An unpatched model of mlx-lm.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig): How they run.
        chunk (int): Tokens of the prompt that are read at once. Default: ``2048``.
        repeats (int): Timings of each. Default: ``3``.
        seconds (float): No measurement begins that would probably end after this
          time. Default: ``60``.
        clock (callable): Seconds. Default: ``time.perf_counter``.
        report (callable): Takes each measurement: ``keys`` and milliseconds.

    Returns:
        dict: ``crossovers`` (of ``tile``, ``exact`` and ``decode`` those that were
        measured: keys, or ``None`` where sparse never won), ``left_out`` (those that are
        not stored, and why), ``longest`` (keys up to which it was looked for), ``rows``
        (each measurement), ``file`` (where it is stored, ``None`` if nothing is).

    Raises:
        ValueError: If the model has no positions beyond ``top_k``.
    """
    longest = min(_LONGEST * config.top_k, positions_of(model) or math.inf)
    if longest < 2 * config.top_k:
        raise ValueError(
            f"[tune] 'top_k' must be at most half of the model's {longest:,} positions "
            f"but got {config.top_k}: nothing shorter is sparse."
        )
    bench = _Bench(model, indexers, config, chunk, repeats, clock)
    start = clock()
    rows, took = {}, {}

    def at(keys: int) -> dict[str, Any]:
        if keys not in rows:
            begin = clock()
            rows[keys] = {"keys": keys, **bench.measure(keys)}
            took[keys] = clock() - begin
            report(rows[keys])
        return rows[keys]

    def has_time(keys: int) -> bool:
        if not took:
            return seconds > 0
        nearest = max(took)
        return clock() - start + took[nearest] * keys / nearest <= seconds

    ways = ["exact", "decode", *(["tile"] if config.tile_fits else [])]
    keys, at_end = 2 * config.top_k, False
    while not at_end and has_time(keys):
        at_end = all(_wins(at(keys), way) for way in ways) or 2 * keys > longest
        keys *= 2
    searched = max(rows, default=0)
    crossovers = {way: _crossover(at, has_time, rows, config.top_k, way) for way in ways if rows}
    left_out = _left_out(crossovers, rows, at_end, config)
    stored = {way: keys for way, keys in crossovers.items() if way not in left_out}
    file = None
    if stored:
        file = str(store(describe(model, indexers, config), stored, sorted(rows)))
    return {
        "crossovers": crossovers,
        "left_out": left_out,
        "longest": searched,
        "rows": [rows[n] for n in sorted(rows)],
        "file": file,
    }


def _wins(row: Mapping[str, float], way: str) -> bool:
    return row[way] < row["dense_decode" if way == "decode" else "dense"]


def _crossover(at: Callable, has_time: Callable, rows: Mapping[int, dict], top_k: int, way: str) -> int | None:
    """Return the fewest keys from which a way always won, measured as closely as pays."""
    while True:
        lost, start = top_k, None
        for keys in sorted(rows):
            if not _wins(rows[keys], way):
                lost, start = keys, None
            elif start is None:
                start = keys
        if start is None or start - lost <= max(1, _PRECISION * lost):
            return start
        middle = (lost + start) // 2
        if not has_time(middle):
            return start
        at(middle)


def _left_out(crossovers, rows, at_end, config) -> dict[str, str]:
    """Return why some ways are not stored: what was not compared says nothing."""
    reasons = {}
    for way in CROSSING:
        if not rows:
            reasons[way] = "there was no time to measure it"
        elif way not in crossovers:
            reasons[way] = (
                f"top_k {config.top_k} has no room for a tile of {config.tile_size}, "
                f"{config.n_sink} sinks and {config.n_recent} recent keys"
            )
        elif len(rows) == 1:
            reasons[way] = "there was time to measure one length alone"
        elif crossovers[way] is None and not at_end:
            reasons[way] = f"slower up to {max(rows):,} keys, and there was no time for more"
    return reasons


def _steps(attentions: list, caches: list, x: mx.array) -> mx.array:
    """Take steps of decode, each from what the one before gave."""
    for _ in range(_DECODE_STEPS):
        for attention, cache in zip(attentions, caches):
            x = mx.fast.rms_norm(attention(x, None, cache), None, 1e-6)
        mx.async_eval(x)
    return x


class _Bench:
    """Time attention layers of a model after random keys."""

    def __init__(self, model, indexers, config, chunk, repeats, clock):
        self._repeats = repeats
        self._clock = clock
        self._config = config
        self._chunk = chunk
        layers = family_of(model).layers(model)
        self._layers = [(layers[i], indexers[i].bind(layers[i])) for i in sorted(indexers)[:_LAYERS]]
        self._shape, _ = self._layers[0]
        self._budget = self._full_budget()

    def measure(self, keys: int) -> dict[str, float]:
        """Return milliseconds a layer: of a chunk around ``keys``, and of a step."""
        calls = self._prefill_calls(keys) | self._decode_calls(keys)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(self._repeats + 1):
            for name, call in calls.items():
                start = self._clock()
                mx.eval(call())
                if repeat:  # the first compiles
                    times[name].append(self._clock() - start)
        n_calls = {name: len(self._layers) for name in calls}
        for name in ("dense_decode", "decode"):
            n_calls[name] *= _DECODE_STEPS
        return {name: 1e3 * median(seconds) / n_calls[name] for name, seconds in times.items()}

    def _prefill_calls(self, keys: int) -> dict[str, Callable]:
        tile_size, top_k = self._config.tile_size, self._config.top_k
        # Both costs grow evenly over a chunk, so it stands for its middle.
        start = keys - min(self._chunk, 2 * (keys - top_k)) // 2
        start = -(-start // tile_size) * tile_size
        n = max(1, 2 * (keys - start))
        x = self._noise(1, n, self._shape.hidden_size)
        caches = [self._filled(indexer, start) for _, indexer in self._layers]

        def call(mode):
            layers = self._sparse(prefill=mode, cache="full", positions="absolute")

            def run():
                outputs = [layer(x, None, c) for layer, c in zip(layers, caches)]
                for cache in caches:
                    cache.trim(n)
                return outputs

            return run

        modes = ["dense", "exact", *(["tile"] if self._config.tile_fits else [])]
        return {mode: call(mode) for mode in modes}

    def _decode_calls(self, keys: int) -> dict[str, Callable]:
        dense = [KVCache() for _ in self._layers]
        for cache in dense:
            cache.update_and_fetch(*self._entries(keys))
        attentions = [layer.module for layer, _ in self._layers]
        x = self._noise(1, 1, self._shape.hidden_size)
        return {
            "dense_decode": lambda: _steps(attentions, dense, x),
            "decode": lambda: _steps(*self._budget, x),
        }

    def _full_budget(self) -> tuple[list[SparseAttention], list[SparseKVCache]]:
        """Return layers and their caches, full and past a prompt."""
        layers = self._sparse(prefill="dense", cache="budget")
        for layer in layers:
            layer.join()
        caches = [make_cache(layer.config, i) for i, layer in enumerate(layers)]
        prompt = self._noise(1, self._config.top_k, self._shape.hidden_size)
        mx.eval([layer(prompt, None, cache) for layer, cache in zip(layers, caches)])
        return layers, caches

    def _sparse(self, **changes: Any) -> list[SparseAttention]:
        config = replace(self._config, cold_bits=None, cold_file=None, **changes)
        plan = plan_prefill(None, config)
        return [SparseAttention(*layer, config, plan) for layer in self._layers]

    def _filled(self, indexer: Indexer, n: int) -> FullKVCache:
        cache = FullKVCache()
        cache.append(*self._entries(n), self._noise(1, 1, n, indexer.args.index_head_dim))
        return cache

    def _entries(self, n: int) -> tuple[mx.array, mx.array]:
        shape = (1, self._shape.n_kv_heads, n, self._shape.head_dim)
        return self._noise(*shape), self._noise(*shape)

    def _noise(self, *shape: int) -> mx.array:
        return mx.random.normal(shape).astype(self._shape.dtype)
