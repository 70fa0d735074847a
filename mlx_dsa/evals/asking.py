"""Questions about long texts under several policies, one dense reading of a text serving them all."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..patch import SparsePatch
from ..presets import Preset
from ..rules import kvzip
from ..tasks.needle_items import NeedleItem
from ..tasks.prompts import frame
from .evaluator import Progress, Result, Row
from .generation import Heard, converse
from .policies import Policy, pairings
from .reading import DenseReading
from .report.stats import paired_proportions, wilson
from .running.runner import Summary, Unit, World, evaluate
from .running.watch import STATES, Watch, verdict
from .subject import check_lengths, describe, fingerprint, policies_config


def ask(
    kind: str,
    subject: Preset,
    policies: Sequence[Policy],
    items: Sequence[NeedleItem],
    about: dict[str, Any],
    *,
    max_tokens: int,
    batch_size: int,
    compare: str | Sequence[str],
    name: str | None,
    out: str | os.PathLike | None,
    world: World | None,
    progress: Progress | None,
) -> Result | None:
    """Hold the conversations of some items under every policy, on the very same items.

    Args:
        kind (str): the evaluator, as results name it.
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        items (list of NeedleItem): the cases.
        about (dict): what the result says of them.
        max_tokens (int): tokens an answer may have.
        batch_size (int): texts at once.
        compare (str or list of str): what is compared with what, as in `pairings`.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result.

    Raises:
        ValueError: if there are no items, one is longer than the model has positions, or a policy reads a text
            again whose question is part of it.
    """
    if not items:
        raise ValueError(f"[{kind}] there are no cases: 'limit' and 'depths' must not be empty.")
    twice = [policy.label for policy in policies if policy.reads_again]
    if twice and any(item.turns[0].values for item in items):
        raise ValueError(
            f"[{kind}] policy {twice[0]!r} reads a text a second time before it is asked about: questions must "
            f"come after it. Use --setting before-question, or leave the policy out."
        )
    totals = [sum(len(t.ids) + bool(t.values) * max_tokens for t in item.turns) for item in items]
    lower = "--lengths or --max-tokens"
    check_lengths(kind, subject, totals, lower, policies, max_tokens)
    config = {
        **describe(subject, name),
        **about,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "policies": policies_config(policies, subject.indexers),
        "compare": compare,
        "cases": fingerprint([[t.ids for t in item.turns] for item in items]),
    }
    # All policies of a batch in a row, so that one dense reading of its texts serves them.
    units = [
        Unit(f"{policy.label}/{i}", (policy, batch))
        for i, batch in enumerate(_batches(items, batch_size))
        for policy in policies
    ]
    readings = _Readings(subject.model, policies)

    def work(payload: tuple[Policy, list[NeedleItem]]) -> list[Row]:
        return _run(subject, payload[0], payload[1], max_tokens, readings)

    def summarise(records: list[Row]) -> Summary:
        return _rows(records, policies), _pairs(records, policies, compare), records

    return evaluate(kind, config, units, work, summarise, out=out, world=world, progress=progress)


def _batches(items: Iterable[NeedleItem], size: int) -> Iterator[list[NeedleItem]]:
    """Group cases whose first turns are equally long, those of one text together."""
    groups: dict[tuple[int, int], dict[tuple[int, ...], list[NeedleItem]]] = {}
    for item in items:
        first = item.turns[0].ids
        texts = groups.setdefault((item.length, len(first)), {})
        texts.setdefault(tuple(first), []).append(item)
    for texts in groups.values():
        texts = list(texts.values())
        for i in range(0, len(texts), size):
            yield [item for text in texts[i : i + size] for item in text]


class _Readings:
    """The dense reading of the batch at hand, for the policies that read densely.

    Only texts that no question is part of are read so, and only where it serves two policies.
    """

    def __init__(self, model: nn.Module, policies: Sequence[Policy]) -> None:
        self._model = model
        self._pays = sum(map(self._dense, policies)) > 1 or any(p.reads_again for p in policies)
        self._of: list[tuple[int, ...]] | None = None
        self._reading: DenseReading | None = None

    @staticmethod
    def _dense(policy: Policy) -> bool:
        return policy.config is None or policy.config.prefill == "dense"

    def read(self, policy: Policy, batch: list[NeedleItem]) -> DenseReading | None:
        """Return the reading that a policy can start from, or ``None``; the model is unpatched."""
        first = batch[0].turns[0]
        if first.values or not (self._pays and self._dense(policy)):
            return None
        # The last token of a prompt is fed by itself, under the policy.
        stop = None if first.opening else -1
        texts = list(dict.fromkeys(tuple(item.turns[0].ids[:stop]) for item in batch))
        if texts != self._of:
            self._of, self._reading = texts, None  # the old one goes first
            self._reading = DenseReading(self._model, mx.array(texts))
        return self._reading


def _run(subject: Preset, policy: Policy, batch: list[NeedleItem], max_tokens: int, readings: _Readings) -> list[Row]:
    tokenizer = subject.tokenizer
    reading = readings.read(policy, batch)
    conversations = [[(turn.ids, bool(turn.values)) for turn in item.turns] for item in batch]
    mx.clear_cache()
    mx.reset_peak_memory()
    with policy.apply(subject, _token_marks(policy, batch, tokenizer), reads_again=True) as patch:
        taken = (reading.caches(subject.model, patch), reading.seconds) if reading else None
        if policy.reads_again:
            assert patch and reading and taken  # it is sparse, and reads densely
            taken = _again(subject.model, patch, reading.ids, tokenizer, *taken)
        watch = Watch(patch, [item.values for item in batch])
        heard = converse(
            subject.model,
            conversations,
            max_tokens=max_tokens,
            stop_ids=set(tokenizer.eos_token_ids),
            begin=watch.begin,
            finished=watch.finished,
            taken=taken,
            opening=batch[0].turns[0].opening,
        )
    # A shared reading is in memory beside what the policy needs.
    peak = None if reading else round(mx.get_peak_memory() / 1e9, 4)
    return [_record(policy, *of, tokenizer, peak) for of in zip(batch, heard, watch.lost)]


def _again(
    model: nn.Module, patch: SparsePatch, ids: mx.array, tokenizer: TokenizerWrapper, caches: list[Any], seconds: float
) -> tuple[list[Any], float]:
    """Read texts that caches hold a second time; return what `converse` takes: them, and the seconds of both."""
    began = perf_counter()
    texts = kvzip.ASK_FIRST, kvzip.ASK_LATER, frame(tokenizer).tail
    asks = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    kvzip.read_again(model, patch.layers, caches, ids, asks)
    return caches, seconds + perf_counter() - began


def _record(
    policy: Policy,
    item: NeedleItem,
    heard: Heard,
    lost: dict[int, str] | None,
    tokenizer: TokenizerWrapper,
    peak: float | None,
) -> Row:
    asked = [turn for turn in item.turns if turn.values]
    replies = [tokenizer.decode(reply.ids).strip() for reply in heard.replies]
    correct = [turn.correct(reply) for turn, reply in zip(asked, replies)]
    record = {
        "item": item.key,
        "hash": fingerprint([turn.ids for turn in item.turns]),
        "policy": policy.label,
        "length": item.length,
        "depth": item.depth,
        "correct": correct[-1],
        "expected": item.expected,
        "reply": replies[-1][:200],
        "read_s": round(heard.read_s, 4),
        "peak_gb": peak,
    }
    if len(correct) > 1:
        record["first_correct"] = correct[0]
    if not correct[-1] and lost:
        record["lost"] = {state: [n for n, s in lost.items() if s == state] for state in STATES}
        record["verdict"] = verdict(lost)
    return record


def _token_marks(policy: Policy, batch: list[NeedleItem], tokenizer: TokenizerWrapper) -> mx.array | None:
    """Return the marks that a policy wants of the first turns' tokens, a row for each text."""
    if policy.wants_marks is None:
        return None
    rows: dict[tuple[int, ...], np.ndarray] = {}
    for item in batch:
        ids = item.turns[0].ids
        row = rows.setdefault(tuple(ids), np.zeros(len(ids), dtype=np.float32))
        if policy.wants_marks == "needle":
            for start, stop in item.spans:
                row[start:stop] = 1
            continue
        for i, token in enumerate(ids):
            if any(c.isdigit() for c in tokenizer.decode([token])):
                row[max(0, i - 20) : i + 2] = 1
    return mx.array(np.stack(list(rows.values())))


def _rows(records: list[Row], policies: Sequence[Policy]) -> list[Row]:
    rows = []
    for policy in policies:
        of_policy = [r for r in records if r["policy"] == policy.label]
        for length in sorted({r["length"] for r in of_policy}):
            of_length = [r for r in of_policy if r["length"] == length]
            for depth in (None, *sorted({r["depth"] for r in of_length})):
                cell = [r for r in of_length if depth is None or r["depth"] == depth]
                rows.append(_row(policy, length, depth, cell))
    return rows


def _row(policy: Policy, length: int, depth: float | None, cell: list[Row]) -> Row:
    correct = sum(r["correct"] for r in cell)
    low, high = wilson(correct, len(cell))
    row = {
        "policy": policy.label,
        "top_k": policy.top_k,
        "length": length,
        "depth": depth,
        "n": len(cell),
        "value": correct / len(cell),
        "low": low,
        "high": high,
        "read_s": statistics.median(r["read_s"] for r in cell),
        "peak_gb": max((r["peak_gb"] for r in cell if r["peak_gb"]), default=None),
    }
    if "first_correct" in cell[0]:
        row["first_turn"] = sum(r["first_correct"] for r in cell) / len(cell)
    wrong = [r for r in cell if "lost" in r]
    if wrong:
        row["verdicts"] = dict(Counter(r["verdict"] for r in wrong))
        row["lost_by_layer"] = {
            state: dict(sorted(Counter(n for r in wrong for n in r["lost"][state]).items())) for state in STATES
        }
    return row


def _pairs(records: list[Row], policies: Sequence[Policy], compare: str | Sequence[str]) -> list[Row]:
    outcomes: dict[tuple[str, int], list[bool]] = {}
    for r in records:
        outcomes.setdefault((r["policy"], r["length"]), []).append(r["correct"])
    return [
        {
            "policy": policy,
            "against": against,
            "length": length,
            **paired_proportions(outcomes[policy, length], outcomes[against, length]),
        }
        for policy, against in pairings(policies, compare)
        for length in dict.fromkeys(r["length"] for r in records)
    ]
