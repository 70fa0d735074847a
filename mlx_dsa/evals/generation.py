"""Greedy answers to several prompts of one length at once.

mlx-lm's generate_step takes one prompt. Evaluations ask hundreds of questions whose prompts are
equally long, so this feeds them as one batch, in the same order of calls: chunks, then the last
token alone, then one token at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ..cache import SparseKVCache
from ..chunks import chunk_size
from ..patch import patch_of

Talk = Sequence[tuple[list[int], bool]]  # turns: tokens to feed, and whether the model is to answer


def spans(n: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of chunks of `n` tokens, none of which is a single token.

    A single one would be a step of decode, and end the prompt.
    """
    edges = [*range(0, n, chunk_size()), n]
    if len(edges) > 2 and n - edges[-2] == 1:
        edges[-2] -= 1
    return list(zip(edges, edges[1:]))


def read(model: nn.Module, ids: mx.array, caches: list[Any]) -> mx.array:
    """Feed tokens, the last one alone, and return the logits after it `[B, V]`.

    A budget is pruned then, as the first token of an answer would do.

    Args:
        model: patched or not.
        ids (mx.array): `[B, L]`.
        caches (list): of the model; they grow.
    """
    last = ids.shape[1] - 1
    edges = [*range(0, last, chunk_size()), last]
    _feed(model, ids, zip(edges, edges[1:]), caches)
    logits = model(ids[:, last:], cache=caches)[:, -1]
    mx.eval(logits)
    patch = patch_of(model)
    if patch is not None:
        patch.end_prompts(caches)
    return logits


def _feed(model: nn.Module, ids: mx.array, chunks: Iterable[tuple[int, int]], caches: list[Any]) -> None:
    # As mlx-lm: a cache's state is read after a chunk, which says that the prompt goes on, and
    # never after its last token or in decode.
    for start, stop in chunks:
        model(ids[:, start:stop], cache=caches)
        mx.eval([c.state for c in caches])


def take_rows(caches: list[Any], rows: list[int]) -> list[Any]:
    """Return caches that hold some rows of a batch; those given don't notice."""
    rows = mx.array(rows)
    # mlx-lm's from_state differs by version.
    taken = [c.copy() if isinstance(c, SparseKVCache) else copy.copy(c) for c in caches]
    for c in taken:
        if isinstance(c, ArraysCache):  # of a layer without attention
            c.filter(rows)
            mx.eval(c.cache)
            continue
        # What ours hold can be read without a word on whether a prompt goes on.
        if isinstance(c, SparseKVCache):
            c.contents = {name: _take(c, rows, a) for name, a in c.contents.items()}
            mx.eval(c.contents)
        else:
            c.state = [_take(c, rows, a) for a in c.state]
            mx.eval(c.state)
    return taken


def _take(cache: Any, rows: mx.array, array: Any) -> Any:
    """Return the rows of an array that texts have: their own, or one for each of their key heads."""
    if not isinstance(array, mx.array) or array.ndim < 2:
        return array
    n = getattr(cache, "rows_a_text", 1)
    if n == 1 or array.shape[0] != cache.keys.shape[0]:
        return array[rows]
    return array[(rows[:, None] * n + mx.arange(n)).reshape(-1)]


@dataclass
class Reply:
    """What a row said: its tokens, and whether it came to an end by itself."""

    ids: list[int]
    ended: bool


def answer(
    model: nn.Module,
    logits: mx.array,
    caches: list[Any],
    *,
    max_tokens: int,
    stop_ids: set[int],
    finished: Callable[[list[int], list[Any]], None] | None = None,
) -> list[Reply]:
    """Write greedily until every row has ended.

    Args:
        model: patched or not.
        logits (mx.array): `[B, V]`, after what was read.
        caches (list): of the model; they grow.
        max_tokens (int): tokens a row may write.
        stop_ids (set of int): tokens that end a row; they are not part of the reply.
        finished (callable): is told (rows, caches) when rows have ended, before the caches see
            what others still write. Default: ``None``.

    Returns:
        list of Reply: one a row.
    """
    replies = [Reply([], False) for _ in range(logits.shape[0])]
    running = set(range(len(replies)))
    while running:
        tokens = mx.argmax(logits, axis=-1)
        ended = []
        for row, token in enumerate(np.array(tokens).tolist()):
            if row not in running:
                continue
            if token in stop_ids:
                replies[row].ended = True
            else:
                replies[row].ids.append(token)
            if token in stop_ids or len(replies[row].ids) == max_tokens:
                ended.append(row)
        running -= set(ended)
        if ended and finished:
            finished(ended, caches)
        if running:
            logits = model(tokens[:, None], cache=caches)[:, -1]
            mx.eval(logits)
    return replies


@dataclass
class Heard:
    """What came of a conversation.

    Args:
        replies (list of Reply): one for each turn that was asked.
        read_s (float): seconds that reading the first turn took, over the rows of its batch.
    """

    replies: list[Reply]
    read_s: float = 0.0


def converse(
    model: nn.Module,
    conversations: Sequence[Talk],
    *,
    max_tokens: int,
    stop_ids: set[int],
    begin: Callable[[list[int]], None] | None = None,
    finished: Callable[[list[int], list[Any], list[int]], None] | None = None,
    taken: tuple[list[Any], float] | None = None,
    opening: bool = False,
) -> list[Heard]:
    """Hold several conversations whose first turns are equally long.

    Conversations with the very same first turn that is not asked, such as several questions about
    one document, read it once.

    Args:
        model: patched or not.
        conversations (list): each a list of (ids, asked): tokens to feed, and whether the model is
            to answer.
        max_tokens (int), stop_ids (set): as in `answer`.
        begin (callable): is told which conversations the rows of the next calls of the model are,
            when these are to answer, and else an empty list. Default: ``None``.
        finished (callable): is told (conversations, their caches, rows of them) when the last
            answer of these is complete. Default: ``None``.
        taken (tuple): caches that hold the distinct first turns already, all but the last token
            unless they are openings, and the seconds that took. Default: ``None``.
        opening (bool): whether the first turns only begin prompts, which the second turns end: the
            caches are then not told of an end between them. Default: ``False``.

    Returns:
        list of Heard: one a conversation.
    """
    heard = [Heard([]) for _ in conversations]
    caches, before = taken or (make_prompt_cache(model), 0.0)
    waiting = []
    rows = list(range(len(conversations)))
    if conversations[0][0][1]:
        waiting.append((rows, rows, caches, 0))
    else:
        firsts = [tuple(talk[0][0]) for talk in conversations]
        unique = list(dict.fromkeys(firsts))
        start = perf_counter()
        if begin:
            begin([])
        if not opening:
            read(model, mx.array(unique)[:, -1 if taken else 0 :], caches)
        elif not taken:
            _feed(model, mx.array(unique), spans(len(unique[0])), caches)
        for one in heard:
            one.read_s = (perf_counter() - start + before) / len(unique)
        waiting.append((rows, [unique.index(first) for first in firsts], caches, 1))
    while waiting:
        members, rows, caches, turn = waiting.pop()
        groups: dict[int, list[tuple[int, int]]] = {}
        for member, row in zip(members, rows):
            groups.setdefault(len(conversations[member][turn][0]), []).append((member, row))
        for pairs in groups.values():
            group, rows = (list(part) for part in zip(*pairs))
            same = len(groups) == 1 and rows == list(range(len(members)))
            part = caches if same else take_rows(caches, rows)
            if begin:
                begin(group)
            start = perf_counter()
            logits = read(model, mx.array([conversations[m][turn][0] for m in group]), part)
            if turn == 0:
                for m in group:
                    heard[m].read_s = (perf_counter() - start) / len(group)

            def ended(rows: list[int], now: list[Any], group: list[int] = group, turn: int = turn) -> None:
                ready = [group[r] for r in rows]
                if turn + 1 < len(conversations[0]):
                    waiting.append((ready, list(range(len(rows))), take_rows(now, rows), turn + 1))
                elif finished:
                    finished(ready, now, rows)

            replies = answer(model, logits, part, max_tokens=max_tokens, stop_ids=stop_ids, finished=ended)
            for member, reply in zip(group, replies):
                heard[member].replies.append(reply)
    return heard
