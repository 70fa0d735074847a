"""Entries by what a second reading of the text attends to.

Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, 2025; its
details as in kvpress 0.5. Deviations: one set and one budget a layer, by the largest attention of
any head; what a chat template puts before the text is repeated with it; what comes after the
reading goes after what came in it. The cost: the text is read twice, the second time with every
chunk after all of it, and for a chunk the entries are in memory twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import SparseKVCache
from .evict_rule import EvictRule

# What asks for the first chunk of a text, and for a later one, whose beginning follows.
ASK_FIRST = "\n\nRepeat the previous context exactly."
ASK_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_CHUNK, _OVERLAP, _SINKS = 2048, 8, 4


@dataclass(frozen=True)
class KVzip(EvictRule):
    """Keep what :func:`read_again` says; it has no name, since without that it says nothing."""

    is_final = True

    # More than any attention: what came after the text goes last.
    _NEWER = 2.0

    def score(self, x, offset):
        return mx.full(x.shape[:2], self._NEWER)

    def observed(self, x, offset):
        return self.attention_queries(x, offset)

    def worth(self, cache):
        return cache.worth

    def shares(self, worth):
        return worth


def read_again(
    model: nn.Module,
    layers: Mapping[int, Any],
    caches: Sequence[Any],
    ids: mx.array,
    asks: Sequence[Sequence[int]],
    chunk: int = _CHUNK,
):
    """Let a model repeat a text that it has read, and note which entries it attends to.

    Args:
        model (nn.Module): A patched model, of prefill ``"dense"``, with the rule :class:`KVzip`.
        layers (Mapping): The ``layers`` of its patch.
        caches (Sequence): One cache a layer, which hold the text and nothing else, before any
            prune; changed in place: ``worth`` of the sparse layers'.
        ids (mx.array): The text ``[B, L]``.
        asks (Sequence): Tokens of what asks for the first chunk, of what asks for a later one, and
            of what stands before the answer.
        chunk (int): Tokens that are repeated at once. Default: ``2048``.

    Raises:
        ValueError: If the caches hold anything else, or the patch another rule or prefill.
    """
    sparse = [caches[i] for i in layers]
    if not all(isinstance(layer.eviction.rule, KVzip) for layer in layers.values()):
        raise ValueError("[read_again] 'layers' must have the rule KVzip.")
    if not all(layer.prefill == "dense" for layer in layers.values()):
        raise ValueError("[read_again] a text is read densely: use prefill 'dense'.")
    if not all(c.evicts and c.offset == c.size() == ids.shape[1] and not c.evicted for c in sparse):
        raise ValueError("[read_again] 'caches' must hold the text whole, and nothing else.")
    found: dict[int, list[mx.array]] = {i: [] for i in layers}
    for start, stop, tokens in _chunks(ids, asks, chunk):
        again: list[Any] = [c.copy() if isinstance(c, SparseKVCache) else copy.deepcopy(c) for c in caches]
        rules = {i: layer.eviction.rule for i, layer in layers.items()}
        try:
            for i, layer in layers.items():
                again[i].prompt.reopen()
                layer.eviction.rule = rules[i]._with(observes=tokens.shape[1])
            model(tokens, cache=again)
        finally:
            for i, layer in layers.items():
                layer.eviction.rule = rules[i]
        for i, layer in layers.items():
            queries, keys = again[i].observed.queries, again[i].keys
            n_sinks = min(_SINKS, start)
            parts = [keys[:, :, :n_sinks], keys[:, :, start:stop], keys[:, :, ids.shape[1] :]]
            paid = _largest(queries, mx.concatenate(parts, axis=2), layer.layer.scale)
            found[i].append(paid[:, n_sinks : n_sinks + stop - start])
            again[i] = queries = keys = parts = None
        mx.eval([paid[-1] for paid in found.values()])
    for i in layers:
        caches[i].worth = mx.concatenate(found[i], axis=1)
    mx.eval([caches[i].contents for i in layers])


def _chunks(ids, asks, chunk) -> Iterator[tuple[int, int, mx.array]]:
    """Yield where a chunk stands in the text, and the tokens that repeat it ``[B, n]``."""
    first, later, before = asks
    B, L = ids.shape
    for start in range(0, L, chunk):
        part = ids[:, start : start + chunk]
        ask = [first] if start == 0 else [later, ids[:, max(0, start - _OVERLAP) : start]]
        rows = [
            x if isinstance(x, mx.array) else mx.broadcast_to(mx.array(x, ids.dtype), (B, len(x)))
            for x in (*ask, before, part)
        ]
        yield start, start + part.shape[1], mx.concatenate(rows, axis=1)


def _largest(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """Return the largest attention that each key is paid by any head and query.

    Args:
        queries (mx.array): ``[B, Hq, n, D]``, of the last ``n`` keys.
        keys (mx.array): ``[B, Hkv, T, D]``.
        scale (float): Factor on the query-key products.

    Returns:
        mx.array: ``[B, T]`` in float32.
    """
    n, T = queries.shape[2], keys.shape[2]
    group = queries.shape[1] // keys.shape[1]
    seen = mx.arange(T) <= mx.arange(T - n, T)[:, None]
    largest = None
    for head in range(queries.shape[1]):
        asked = queries[:, head].astype(mx.float32) * scale
        logits = asked @ keys[:, head // group].astype(mx.float32).swapaxes(1, 2)
        paid = mx.softmax(mx.where(seen, logits, -mx.inf), axis=-1).max(axis=1)
        largest = paid if largest is None else mx.maximum(largest, paid)
    return largest
