"""A suite: a JSON file that names runs, and the report that they make together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..config import SparseConfig, override
from ..files import write_text
from ..pictures import check_pictures
from ..presets import Preset
from .evaluator import Evaluator, Progress, Result, evaluator_kinds, evaluator_of
from .policies import Policy, make_policies
from .report.board import board, board_markdown, check_board
from .report.overview import check_cells, check_labels, overview
from .report.plots import plot, plot_board, plot_retention
from .report.tables import caption, markdown, pairs_table, table
from .running.runner import World

DTYPES = ("float32", "float16", "bfloat16")
_OWN = ("name", "kind", "title", "policies", "top_k", "config", "quick")
# By key, or by the type of the evaluator's default: what a value is, and what the entries of a list are.
_VALUES: dict[Any, Any] = {
    **dict.fromkeys(("config", "quick"), (dict,)),
    **dict.fromkeys(("policies", "top_k"), (list, str, int, dict)),
    **{"lengths": (list, int), "select": (list, str), tuple: (list, int, float)},
    **{kind: (kind,) for kind in (bool, int, str)},
    "compare": ((str, list),),
}


def read_suite(path: str | os.PathLike) -> dict[str, Any]:
    """Read a suite file.

    Returns:
        dict: with "runs", and where given "name", "title", "preset", "config" (fields of
        SparseConfig for all runs), "dtype", in which the model then computes, "pictures": each
        with a "name", a "title" and the needle "runs" whose accuracy by retention it shows, "tables":
        each with a "title", "columns" and "rows", as `overview` takes them, and "boards", as `board` does.

    Raises:
        ValueError: if it is not there, no JSON, or a run in it is not valid.
    """
    try:
        suite = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"[suite] '{path}' is not there.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"[suite] '{path}' is not JSON: {error}.") from None
    if not isinstance(suite, dict) or not isinstance(suite.get("runs"), list) or not suite["runs"]:
        raise ValueError(f"[suite] '{path}' must hold an object with a list of \"runs\".")
    if not all(isinstance(run, dict) for run in suite["runs"]):
        raise ValueError(f"[suite] '{path}': each of the \"runs\" must be an object.")
    names = [run.get("name") for run in suite["runs"]]
    for run in suite["runs"]:
        _check(run, names)
    if suite.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"[suite] 'dtype' must be one of {', '.join(DTYPES)} but got {suite['dtype']!r}.")
    for picture in suite.get("pictures", []):
        _require("picture", picture, name=str, runs=list)
        for run in select_runs(suite, picture["runs"]):
            if not evaluator_of(run["kind"]).asks:
                asking = " or ".join(kind for kind in evaluator_kinds() if evaluator_of(kind).asks)
                raise ValueError(
                    f"[suite] picture '{picture['name']}' must be of {asking} but run '{run['name']}' is {run['kind']}."
                )
    for shown in suite.get("tables", []):
        _require("table", shown, title=str, columns=list, rows=dict)
        check_cells(shown, _kinds(suite))
    for shown in suite.get("boards", []):
        check_board(shown, _kinds(suite))
    return suite


def _kinds(suite: dict[str, Any]) -> dict[str, str]:
    return {run["name"]: run["kind"] for run in suite["runs"]}


def _require(what: str, entry: Any, **kinds: type) -> None:
    """Refuse a picture or table that lacks a key, or has another value there."""
    for key, kind in kinds.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            words: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
            raise ValueError(f"[suite] each {what} must have {words[kind]} as {key!r} but got {entry!r}.")


def select_runs(suite: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs of these names.

    Raises:
        ValueError: if there is none of a name.
    """
    runs = {run["name"]: run for run in suite["runs"]}
    unknown = [name for name in names if name not in runs]
    if unknown:
        raise ValueError(f"[suite] there is no run {unknown[0]!r}: the runs are {', '.join(runs)}.")
    return [run for name, run in runs.items() if name in names]


def _check(run: dict[str, Any], names: list[Any]) -> None:
    name, kind = run.get("name"), run.get("kind")
    if not name or names.count(name) > 1:
        raise ValueError(f"[suite] each run needs a name of its own but got {name!r}.")
    if kind not in evaluator_kinds():
        raise ValueError(
            f"[suite] run '{name}': 'kind' must be one of {', '.join(evaluator_kinds())} but got {kind!r}."
        )
    options = evaluator_of(kind).options
    for options_of in (run, run.get("quick", {})):
        _check_values(name, options_of, {k: p.default for k, p in options.items()})
        unknown = [k for k in options_of if k not in (*_OWN, *options)]
        if unknown:
            raise ValueError(
                f"[suite] run '{name}': unknown key {unknown[0]!r}: the keys are {', '.join((*_OWN, *options))}."
            )


def _check_values(name: str, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse what is no text, number, list or object where that is wanted."""
    for key, value in options.items():
        kinds = _VALUES.get(key) or _VALUES.get(type(defaults.get(key)))
        if kinds is None:
            continue
        inner = value if kinds[0] is list and isinstance(value, list) else ()
        fits = isinstance(value, kinds[0]) and all(isinstance(x, kinds[1:]) for x in inner)
        if not fits or (isinstance(value, bool) and kinds[0] is not bool):
            raise ValueError(f"[suite] run '{name}': {key!r} has a wrong value: {value!r}.")


def run_suite(
    subject: Preset,
    suite: dict[str, Any],
    folder: str | os.PathLike,
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    name: str | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Make every run of a suite that is not made yet, and write the report.

    Args:
        subject (Preset): the model with its tokenizer, indexers and config.
        suite (dict): from `read_suite`.
        folder (Path): gets a .json and a .png for each run, and report.md.
        only (list of str): names of runs: make these alone, and no report. Default: ``()``, all.
        quick (bool): take each run's "quick" options. Default: ``False``.
        name (str): what the model was loaded as. Default: ``None``.
        world, progress: as in `evaluate`; `progress` is told the run's name in the key.

    Returns:
        dict: the results by run; none from a `Share`.
    """
    folder = Path(folder)
    check_pictures()
    base = subject._replace(config=_config(subject.config, suite.get("config", {})))
    # What is wrong with the last run, or a table, shows before the work of the first.
    plans = {run["name"]: _plan(run, base.config, quick) for run in suite["runs"]}
    for shown in suite.get("tables", []) if not quick else ():
        check_labels(shown, {name: plan.labels for name, plan in plans.items()})
    if "dtype" in suite:
        subject.model.set_dtype(getattr(mx, suite["dtype"]))
    first = world is None or world.rank == 0
    results: dict[str, Result] = {}
    for run in select_runs(suite, only) if only else suite["runs"]:
        given = {"name": name, "out": folder / f"{run['name']}.json", "world": world}
        result = plans[run["name"]].run(base, {**given, "progress": _naming(run["name"], progress)})
        if result and first:
            plot(result, folder / f"{run['name']}.png")
        if result:
            results[run["name"]] = result
    if first and len(results) == len(suite["runs"]):
        for picture in suite.get("pictures", []):
            shown = [results[run] for run in picture["runs"]]
            plot_retention(shown, picture.get("title", ""), folder / f"{picture['name']}.png")
        draw_boards(suite, results, folder)
        write_text(folder / "report.md", report(suite, results, quick))
    return results


def draw_boards(suite: dict[str, Any], results: dict[str, Result], folder: str | os.PathLike) -> None:
    """Draw the boards of a suite: accuracy by budget, one line a rule."""
    for shown in suite.get("boards", []):
        rows = board(shown, results)
        if any("mean" in row for row in rows):
            plot_board(rows, shown["title"], Path(folder) / f"board-{shown['name']}.png")


def _naming(run: str, progress: Progress | None) -> Progress | None:
    return progress and (lambda done, total, key: progress(done, total, f"{run}: {key}"))


class _Plan(NamedTuple):
    """A run with its settings and policies: none for a selection, which has K."""

    evaluator: Evaluator
    config: SparseConfig
    policies: list[Policy] | None
    options: dict[str, Any]

    @property
    def labels(self) -> list[Any]:
        """What a cell of a table may name."""
        return self.options["top_k"] if self.policies is None else [p.label for p in self.policies]

    def run(self, subject: Preset, given: dict[str, Any]) -> Result | None:
        """Return the result, or ``None`` from a `Share`."""
        if self.policies is None:
            return self.evaluator.run(subject._replace(config=self.config), **self.options, **given)
        return self.evaluator.run(subject, self.policies, **self.options, **given)


def _plan(run: dict[str, Any], config: SparseConfig, quick: bool) -> _Plan:
    options = {k: v for k, v in run.items() if k not in ("name", "kind", "title", "quick")}
    options.update(run.get("quick", {}) if quick else {})
    evaluator, config = evaluator_of(run["kind"]), _config(config, options.pop("config", {}))
    wanted = [k for k, p in evaluator.options.items() if p.default is p.empty]
    missing = [k for k in wanted if not isinstance(options.get(k), list)]
    if missing:
        raise ValueError(f"[suite] run '{run['name']}' must have a list as {missing[0]!r}.")
    if not evaluator.takes_policies:
        options.pop("policies", None)
        return _Plan(evaluator, config, None, options)
    top_k, names = options.pop("top_k", ()), options.pop("policies", ("dense", "sparse"))
    return _Plan(evaluator, config, make_policies(names, config, top_k), options)


def _config(config: SparseConfig, changes: dict[str, Any]) -> SparseConfig:
    known = {f.name: getattr(config, f.name) for f in fields(SparseConfig)}
    return SparseConfig.from_dict(override(known, changes))


def report(suite: dict[str, Any], results: dict[str, Result], quick: bool = False) -> str:
    """Return the report of a suite in Markdown."""
    lines = [f"# {suite.get('title', suite.get('name', 'Results'))}", ""]
    if quick:
        lines += ["Made with --quick: too few cases to rely on.", ""]
    first = next(iter(results.values()))
    work = sum(r["work_s"] for r in results.values())
    about = [f"{k} {v}" for k, v in first["versions"].items()]
    machine, model = first["device"], first["config"]["model"]
    where = f"{machine['device']}, {machine['system']} {machine['machine']}"
    lines += [
        f"Model: {model['name']}, in {model['dtype']}. {', '.join(about)}. {where}, "
        f"{machine['cpus']} processors. {work:,.0f} s of work in all.",
        "",
        "Intervals are 95%: Wilson for shares of right answers, bootstrap over texts for the rest. "
        "Comparisons are in pairs, on the very same items, by McNemar's exact test. *Could have "
        "shown*: the smallest difference that would have been significant, given how many pairs "
        "disagreed. *Right where it is*: the share among the items that the other answered right.",
        "",
    ]
    for picture in suite.get("pictures", []):
        lines += [f"![{picture['name']}]({picture['name']}.png)", ""]
    for shown in suite.get("tables", []) if not quick else ():
        lines += [f"## {shown['title']}", "", markdown(*overview(shown, results)), ""]
    lines += [board_markdown(shown, results) for shown in suite.get("boards", [])]
    for run in suite["runs"]:
        result = results[run["name"]]
        lines += [f"## {run.get('title', run['name'])}", ""]
        note = caption(result)
        if note:
            lines += [note, ""]
        lines += [markdown(*table(result)), ""]
        pairs = pairs_table(result)
        if pairs:
            lines += [markdown(*pairs), ""]
        lines += [f"![{run['name']}]({run['name']}.png)", ""]
    return "\n".join(lines)
