"""The leaderboard: every rule of forgetting and of selecting over a suite, as tables and pictures."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..config import SparseConfig
from ..families import family_of
from ..files import write_text
from ..pictures import check_pictures
from ..presets import Preset
from ..registry import rule_class
from ..rules import rule_names
from .each_rule import EVERY, Spec, rules_alone
from .evaluator import Progress, Result
from .generation import read
from .policies import make_policies
from .report.board import board_markdown
from .running.results import read_result
from .running.runner import World
from .suite import draw_boards, report, run_suite, select_runs

# A rule is tried on a text of so many tokens.
_TRIED = 200
_SMALL: dict[str, Any] = {"top_k": 96, "n_recent": 16}


def leaderboard(
    subject: Preset,
    suite: dict[str, Any],
    folder: str | os.PathLike,
    *,
    rules: Sequence[str] = (),
    only: Sequence[str] = (),
    quick: bool = False,
    name: str | None = None,
    world: World | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = print,
) -> tuple[dict[str, Result], dict[str, Exception]]:
    """Make the runs of a suite for every rule that works, and write what came of it.

    A rule that fails on a short text is left out. A run that fails does not keep the others from being
    made: the same call makes it again. What is there already is not made again.

    Args:
        subject (Preset): the model with its tokenizer, indexers and config.
        suite (dict): from `read_suite`; "evict:*" and "select:*" among its policies, and ``["*"]`` as
            "select" of a retrieval, stand for the rules.
        folder (Path): gets a .json and a .png for each run, leaderboard.md, a picture for each
            board, and once all runs are there report.md.
        rules (list of str): take these rules alone. Default: ``()``, all.
        only (list of str): make these runs alone. Default: ``()``, all.
        quick (bool): take each run's "quick" options. Default: ``False``.
        name (str): what the model was loaded as. Default: ``None``.
        world, progress: as in `run_suite`.
        note (callable): is told what is left out and what fails. Default: ``print``.

    Returns:
        (dict, dict): the results by run, and what failed by run: its errors.

    Raises:
        ValueError: if a rule, or a run, is unknown, or none is left.
    """
    folder = Path(folder)
    check_pictures()
    alone = world is None or world.size == 1
    suite, left_out = for_rules(suite, subject, rules)
    for rule, why in left_out.items():
        note(f"Left out: {rule}: {why}")
    wanted = select_runs(suite, only) if only else suite["runs"]
    results: dict[str, Result] = {}
    failed: dict[str, Exception] = {}
    for run in (run["name"] for run in wanted):
        given: dict[str, Any] = {"quick": quick, "name": name, "world": world, "progress": progress}
        try:
            results.update(run_suite(subject, suite, folder, only=[run], **given))
        except Exception as error:  # the other runs don't need this one
            if not alone:  # the other processes would wait for this one
                raise
            failed[run] = error
            note(f"Failed: {run}: {error}")
    if world is None or world.rank == 0:
        for run in (run["name"] for run in suite["runs"] if run["name"] not in results):
            if (folder / f"{run}.json").exists():
                results[run] = read_result(folder / f"{run}.json")
        if results:
            draw_boards(suite, results, folder)
            write_text(folder / "leaderboard.md", page(suite, results, left_out, failed, quick))
        if len(results) == len(suite["runs"]):
            write_text(folder / "report.md", report(suite, results, quick))
    return results, failed


def page(
    suite: dict[str, Any],
    results: dict[str, Result],
    left_out: Mapping[str, str] | tuple[()] = (),
    failed: Mapping[str, Exception] | tuple[()] = (),
    quick: bool = False,
) -> str:
    """Return the leaderboard in Markdown: of each board a table for each K.

    Args:
        suite (dict): from `read_suite`, with "boards".
        results (dict): from runs to their results; what is not there has no column.
        left_out (dict), failed (dict): rules, and runs, with what is the matter. Default: ``()``.
        quick (bool): whether the runs were. Default: ``False``.
    """
    first = next(iter(results.values()))
    model, machine = first["config"]["model"], first["device"]
    device = machine.get("device_name", machine["device"])
    lines = [f"# {suite.get('title', suite.get('name', 'Leaderboard'))}", ""]
    if quick:
        lines += ["Made with --quick: too few cases to rely on.", ""]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    lines += [f"Model: {model['name']}, in {model['dtype']}. {versions}. {device}.", ""]
    lines += [f"Left out: {rule}: {why}\n" for rule, why in dict(left_out).items()]
    lines += [f"Failed: {run}: {why}\n" for run, why in dict(failed).items()]
    lines += [board_markdown(spec, results) for spec in suite.get("boards", [])]
    return "\n".join(lines)


def for_rules(
    suite: dict[str, Any], subject: Preset, rules: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a suite with the rules that work in place of "every rule", and why others don't.

    Args:
        suite (dict): from `read_suite`.
        subject (Preset): the model.
        rules (list of str): take these alone. Default: ``()``, all that need no options.

    Returns:
        (dict, dict): the suite, and from each rule that is left out to what is the matter.
    """
    unknown = [r for r in rules if not any(r in rule_names(kind) for kind in EVERY.values())]
    if unknown:
        there = dict.fromkeys(n for kind in EVERY.values() for n in rule_names(kind))
        raise ValueError(f"[leaderboard] there is no rule {unknown[0]!r}: the rules are {', '.join(there)}.")
    use: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for kind in EVERY.values():
        use[kind] = []
        for rule in rules_alone(kind):
            if rules and rule not in rules:
                continue
            why = _trouble(subject, kind, rule)
            if why is None:
                use[kind].append(rule)
            else:
                left_out[f"{kind} {rule}"] = why
    suite = copy.deepcopy(suite)
    for run in suite["runs"]:
        for options in (run, run.get("quick", {})):
            if options.get("select") == ["*"]:
                options["select"] = use["select"]
            if "policies" in options:
                options["policies"] = [p for spec in options["policies"] for p in _with(spec, use)]
    return suite, left_out


def _with(spec: Spec, use: dict[str, list[str]]) -> list[Spec]:
    """Return a policy's spec with the rules in it that it stands for; nothing if there is none."""
    fields = {"policy": spec} if isinstance(spec, str) else spec
    kind = EVERY.get(str(fields.get("policy")))
    if kind is None:
        return [spec]
    return [{**fields, "rules": use[kind]}] if use[kind] else []


def _trouble(subject: Preset, kind: str, rule: str) -> str | None:
    """Return what is the matter with a rule on a short text, or ``None``."""
    cls = rule_class(kind, rule)
    indexers = subject.indexers.values()
    if cls.wants_indexer and None in indexers:
        return "it reads indexers, and there are none"
    if getattr(cls, "wants_head", False) and not all(getattr(i, "has_retention", False) for i in indexers):
        return "it reads retention heads, and there are none"
    try:
        config = SparseConfig(prefill="dense", **_SMALL)
        (policy,) = make_policies([{"policy": f"{kind}:*", "rules": [rule]}], config)
        size = family_of(subject.model).args(subject.model).vocab_size
        ids = mx.random.randint(0, size, (2, _TRIED), key=mx.random.key(0))
        with policy.apply(subject):
            caches = make_prompt_cache(subject.model)
            logits = read(subject.model, ids, caches)
            for _ in range(3):
                logits = subject.model(mx.argmax(logits, axis=-1)[:, None], cache=caches)[:, -1]
            if not mx.isfinite(logits).all().item():
                return "it gives no finite numbers"
    except Exception as error:  # of a rule that may not be ours
        return f"{type(error).__name__}: {error}"
    return None
