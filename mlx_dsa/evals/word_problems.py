"""Word problems with worked answers, in GSM8K's format [1].

[1] Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..presets import Preset
from ..tasks.documents import HUB, load_hub, read_lines
from ..tasks.extraction import INVALID, flexible, matches, strict
from ..tasks.options import answer_tokens, option
from ..tasks.problems import make_problems
from ..tasks.prompts import frame
from .evaluator import Evaluator, Progress, Result, Row, register, takes
from .generation import Heard, converse
from .policies import Policy, pairings
from .report.plots import plot_gsm8k
from .report.stats import paired_proportions, wilson
from .report.tables import gsm8k_table, problems_note, proportions
from .running.runner import Summary, Unit, World, evaluate
from .subject import check_lengths, describe, fingerprint, policies_config

PROMPTS = ("chat", "plain")
_KEYS = ("question", "answer")  # of a problem
# Where a continuation of "Question: ... Answer:" begins the next question by itself.
_STOPS = ("Question:", "</s>", "<|im_end|>")


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer, which ends in "#### N"."""

    key: str
    question: str
    answer: str


_Item = tuple[Problem, list[int]]  # with the tokens of its prompt


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """The options of `gsm8k`.

    Args:
        prompt (str): "chat", examples as earlier turns in the model's own chat format; or "plain",
            "Question: ... Answer: ..." as the field has it.
        shots (int): Worked examples before the question.
        many_shot (int): So many instead, to make the prompt longer than the budget.
        data (str, optional): A .jsonl file with "question" and "answer", or "gsm8k" (the hub's test set).
        examples (str, optional): Where the worked examples come from, likewise. By default "gsm8k"'s own
            training set, the other bundled problems, or for a file the lines after the `limit`.
        limit (int): Problems.
        max_tokens (int): Tokens an answer may have.
        batch_size (int): Problems at once, where their prompts are equally long.
        seed (int): Of the bundled problems, and of which examples are shown.
        compare (str or list of str): As in `Grid`.
    """

    prompt: str = option("chat", "Examples as turns of a chat, or as plain text.", choices=PROMPTS)
    shots: int = option(0, "Worked examples before the problem.", least=0)
    many_shot: int = option(0, "So many instead, so that prompts are longer than the budget.", least=0, told="")
    data: str | None = option(
        None,
        "A .jsonl file with question and answer, or gsm8k (the hub's test set).",
        told="bundled problems",
        metavar="FILE|NAME",
    )
    examples: str | None = option(
        None, "Where the worked examples come from.", told="the rest of the data", metavar="FILE|NAME"
    )
    limit: int = option(100, "Problems.", least=1, quick=8)
    max_tokens: int = answer_tokens(256)
    batch_size: int = 1
    seed: int = 0
    compare: str | Sequence[str] = "dense"


@takes(ProblemOptions)
def gsm8k(
    subject: Preset,
    policies: Sequence[Policy],
    options: ProblemOptions,
    *,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Let a model solve word problems, under every policy on the very same ones.

    Args:
        subject (Preset): the model with its tokenizer and indexers.
        policies (list of Policy): what to run.
        options: each field of `ProblemOptions` is an argument.
        name, out, world, progress: as in `needle`.

    Returns:
        dict: the result.
    """
    prompt, max_tokens, seed = options.prompt, options.max_tokens, options.seed
    if prompt not in PROMPTS:
        raise ValueError(f"[gsm8k] 'prompt' must be chat or plain but got {prompt!r}.")
    problems, pool = _load(options.data, options.examples, options.limit, seed)
    n_shots = options.many_shot or options.shots
    if n_shots > len(pool):
        raise ValueError(f"[gsm8k] {n_shots} worked examples are wanted but there are {len(pool)}. Give --examples.")
    shown = random.Random(seed).sample(pool, n_shots)
    build = _chat if prompt == "chat" else _plain
    items = [(p, build(subject.tokenizer, shown, p.question)) for p in problems]
    longest = max(len(ids) for _, ids in items) + max_tokens
    lower = "--shots, --many-shot or --max-tokens"
    check_lengths("gsm8k", subject, [longest], lower, policies, max_tokens)
    config = {
        **describe(subject, name),
        "prompt": prompt,
        "shots": n_shots,
        "data": options.data or "bundled problems",
        "limit": options.limit,
        "max_tokens": max_tokens,
        "batch_size": options.batch_size,
        "seed": seed,
        "policies": policies_config(policies, subject.indexers),
        "compare": options.compare,
        "cases": fingerprint([[p.key, ids, p.answer] for p, ids in items]),
    }
    units = [
        Unit(f"{policy.label}/{i}", (policy, batch))
        for policy in policies
        for i, batch in enumerate(_batches(items, options.batch_size))
    ]

    def work(payload: tuple[Policy, list[_Item]]) -> list[Row]:
        return _run(subject, payload[0], payload[1], max_tokens, () if prompt == "chat" else _STOPS)

    def summarise(records: list[Row]) -> Summary:
        return _rows(records, policies), _pairs(records, policies, options.compare), records

    return evaluate("gsm8k", config, units, work, summarise, out=out, world=world, progress=progress)


def load_problems(source: str) -> list[Problem]:
    """Return the problems of a .jsonl(.gz) file, or of a hub data set by name.

    Raises:
        ValueError: if there are none, or a line is not a problem; its number is told.
    """
    if Path(source).exists() or source.endswith((".jsonl", ".jsonl.gz")):
        if not Path(source).exists():
            raise ValueError(f"[gsm8k] '{source}' is not there.")
        rows = [(f"line {n}", row) for n, row in read_lines(source, _KEYS)]
    else:
        name, _, split = source.partition(":")
        hub, part, test, _ = HUB.get(name, (name, None, "test", None))
        rows = [(f"row {i}", row) for i, row in enumerate(load_hub(hub, part, split or test))]
    problems = []
    for place, row in rows:
        if not all(isinstance(row.get(key), str) for key in _KEYS):
            raise ValueError(f'[gsm8k] \'{source}\' {place} has no "question" and "answer".')
        if strict(row["answer"]) == INVALID:
            raise ValueError(f"[gsm8k] '{source}' {place}: the answer does not end in \"#### N\".")
        problems.append(Problem(place, row["question"], row["answer"]))
    if not problems:
        raise ValueError(f"[gsm8k] '{source}' holds no problems.")
    return problems


def _load(data: str | None, examples: str | None, limit: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to solve, and those to show as examples."""
    if data is None:
        made = make_problems(random.Random(f"{seed}/heldout"), limit, "heldout")
        problems = [Problem(f"{i} {p.template}", p.question, p.answer) for i, p in enumerate(made)]
        # Examples have other names, things and numbers than the problems.
        others = make_problems(random.Random(f"{seed}/examples"), 600, "train") if examples is None else []
        pool = [Problem(f"example {i}", p.question, p.answer) for i, p in enumerate(others)]
    else:
        everything = load_problems(data)
        problems, pool = everything[:limit], everything[limit:]
    if examples or data == "gsm8k":
        pool = load_problems(examples or "gsm8k:train")
    return problems, pool


def _chat(tokenizer: TokenizerWrapper, shown: list[Problem], question: str) -> list[int]:
    around = frame(tokenizer)
    text = around.head
    for example in shown:
        text += example.question + around.tail + example.answer + around.again
    return list(tokenizer.encode(text + question + around.tail, add_special_tokens=False))


def _plain(tokenizer: TokenizerWrapper, shown: list[Problem], question: str) -> list[int]:
    parts = [f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in shown]
    return list(tokenizer.encode("".join(parts) + f"Question: {question}\nAnswer:"))


def _batches(items: list[_Item], size: int) -> list[list[_Item]]:
    groups: dict[int, list[_Item]] = {}
    for item in items:
        groups.setdefault(len(item[1]), []).append(item)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _run(subject: Preset, policy: Policy, batch: list[_Item], max_tokens: int, stops: tuple[str, ...]) -> list[Row]:
    tokenizer = subject.tokenizer
    with policy.apply(subject):
        heard = converse(
            subject.model,
            [[(ids, True)] for _, ids in batch],
            max_tokens=max_tokens,
            stop_ids=set(tokenizer.eos_token_ids),
        )
    mx.clear_cache()
    return [_record(policy, *of, tokenizer, stops) for of in zip(batch, heard)]


def _record(policy: Policy, item: _Item, heard: Heard, tokenizer: TokenizerWrapper, stops: tuple[str, ...]) -> Row:
    problem, ids = item
    reply = heard.replies[0]
    text = tokenizer.decode(reply.ids)
    cut = min((text.find(stop) for stop in stops if stop in text), default=None)
    text = text[:cut]
    wanted = strict(problem.answer)
    return {
        "item": problem.key,
        "hash": fingerprint([ids, wanted]),
        "policy": policy.label,
        "strict": matches(strict(text), wanted),
        "flexible": matches(flexible(text), wanted),
        "expected": wanted,
        "reply": text.strip()[-200:],
        "truncated": not reply.ended and cut is None,
        "prompt_tokens": len(ids),
        # The last token of the reply is never read, so what is read is one less.
        "dropped": bool(policy.top_k and len(ids) + len(reply.ids) - 1 > policy.top_k),
        "read_s": round(heard.read_s, 4),
    }


def _rows(records: list[Row], policies: Sequence[Policy]) -> list[Row]:
    rows = []
    for policy in policies:
        mine = [r for r in records if r["policy"] == policy.label]
        for reading in ("strict", "flexible"):
            right, n = sum(r[reading] for r in mine), len(mine)
            low, high = wilson(right, n)
            rows.append(
                {
                    "policy": policy.label,
                    "top_k": policy.top_k,
                    "reading": reading,
                    "n": n,
                    "value": right / n,
                    "low": low,
                    "high": high,
                    "truncated": sum(r["truncated"] for r in mine) / n,
                    "longer_than_top_k": sum(r["prompt_tokens"] > policy.top_k for r in mine) / n
                    if policy.top_k
                    else None,
                    "dropped": sum(r["dropped"] for r in mine) / n,
                }
            )
    return rows


def _pairs(records: list[Row], policies: Sequence[Policy], compare: str | Sequence[str]) -> list[Row]:
    outcomes = {p.label: [r for r in records if r["policy"] == p.label] for p in policies}
    return [
        {
            "policy": label,
            "against": against,
            "reading": reading,
            **paired_proportions(*([r[reading] for r in outcomes[p]] for p in (label, against))),
        }
        for label, against in pairings(policies, compare)
        for reading in ("strict", "flexible")
    ]


register(
    Evaluator(
        "gsm8k",
        gsm8k,
        gsm8k_table,
        plot_gsm8k,
        pairs=proportions(["reading"]),
        note=problems_note,
        metrics=("strict", "flexible"),
    )
)
