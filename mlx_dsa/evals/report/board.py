"""A board: how every rule does, over several runs of a suite, by budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..each_rule import SELECT
from ..evaluator import Result, Row, Table
from .stats import wilson
from .tables import markdown, percent

_RUNS = {"ppl": "ppl", "timing": "timing", "retrieval": "retrieval"}  # key of a board -> the run's kind
_FIRST = "/first"  # behind a run's name: the first question's answers


def check_board(spec: Any, kinds: Mapping[str, str]) -> None:
    """Refuse a board that is none, or is of runs that are not there or of another kind.

    Args:
        spec (dict): as `board` takes it.
        kinds (dict): from runs to their kinds.
    """
    columns = spec.get("accuracy") if isinstance(spec, dict) else None
    named = isinstance(columns, dict) and all(isinstance(spec.get(k), str) for k in ("name", "title"))
    if columns is None or not named:
        raise ValueError(
            f"[suite] each board must have a 'name', a 'title' and an object as 'accuracy' but got {spec!r}."
        )
    wanted = [(run.removesuffix(_FIRST), "needle") for run in columns.values()]
    wanted += [(spec[key], kind) for key, kind in _RUNS.items() if key in spec]
    for run, kind in wanted:
        if kinds.get(run) != kind:
            raise ValueError(
                f"[suite] board '{spec['name']}' wants a run of kind {kind} but {run!r} is {kinds.get(run, 'none')}."
            )


def board(spec: dict[str, Any], results: Mapping[str, Result]) -> list[Row]:
    """Return what every rule does at every budget.

    Args:
        spec (dict): "name", "title"; "accuracy", from a column to a needle run, or to the run and
            "/first" for its first question; and where there are such runs "ppl", "timing",
            "retrieval".
        results (dict): from runs to their results; what is not there is left out.

    Returns:
        list of dict: a row for the dense model and each rule and K: "rule", "top_k", "cells" (from a
        column to right answers and answers in all), and where known "mean" (share, low, high: of all
        answers, each taken as independent), "ppl" (pair with dense), "mass", "timing" (row).
    """
    rows: dict[str, Row] = {}

    def row(label: str) -> Row:
        name, _, top_k = label.partition("@")
        blank: Row = {"rule": name.removeprefix(SELECT), "top_k": int(top_k) if top_k else None, "cells": {}}
        return rows.setdefault(label, blank)

    for column, run in spec["accuracy"].items():
        key = "first_correct" if run.endswith(_FIRST) else "correct"
        items = results.get(run.removesuffix(_FIRST), {}).get("items", ())
        for item in items:
            cells = row(item["policy"])["cells"]
            right, n = cells.get(column, (0, 0))
            cells[column] = right + item[key], n + 1
    for found in rows.values():
        right, n = map(sum, zip(*found["cells"].values()))
        found["mean"] = (right / n, *wilson(right, n))
    for pair in results.get(spec.get("ppl", ""), {}).get("pairs", ()):
        if pair["against"] == "dense":
            row(pair["policy"])["ppl"] = pair
    for timed in results.get(spec.get("timing", ""), {}).get("rows", ()):
        row(timed["policy"])["timing"] = timed
    for measured in results.get(spec.get("retrieval", ""), {}).get("rows", ()):
        if measured["layer"] is None and measured["policy"].startswith(SELECT):
            row(f"{measured['policy']}@{measured['top_k']}")["mass"] = measured
    return list(rows.values())


def board_tables(spec: dict[str, Any], rows: list[Row]) -> dict[int, Table]:
    """Return the board's tables: from each K to a header and rows, the best rule first.

    Args:
        spec, rows: of `board`.
    """
    columns = [c for c in spec["accuracy"] if any(c in r["cells"] for r in rows)]
    more = [(key, forms) for key, forms in _MORE.items() if any(key in r for r in rows)]
    header = ["rule", "mean [95%]"] if columns else ["rule"]
    header += [*columns, *(title for _, forms in more for title in forms)]
    dense = [r for r in rows if r["top_k"] is None]
    tables = {}
    for k in sorted({r["top_k"] for r in rows} - {None}):
        of_k = sorted((r for r in rows if r["top_k"] == k), key=_order)
        lines = []
        for r in (*dense, *of_k):
            shares = [percent(r["cells"][c][0] / r["cells"][c][1]) if c in r["cells"] else "-" for c in columns]
            mean = [percent(*r["mean"]) if "mean" in r else "-"] if columns else []
            rest = [form(r[key]) if key in r else "-" for key, forms in more for form in forms.values()]
            lines.append([r["rule"], *mean, *shares, *rest])
        tables[k] = header, lines
    return tables


def _order(row: Row) -> tuple[float, float, float]:
    ppl = row.get("ppl", {}).get("ratio", 0)
    return -row.get("mean", (0,))[0], ppl, -row.get("mass", {}).get("mass_value", 0)


def _bytes(timed: Row) -> str:
    return "-" if timed["entry_bytes"] is None else f"{timed['entry_bytes']:,.0f}"


def _ratio(pair: Row) -> str:
    ends = [pair[k] for k in ("ratio_low", "ratio_high")]
    return f"{pair['ratio']:.3f}" + ("" if None in ends else " [{:.3f}, {:.3f}]".format(*ends))


# Key of a row -> columns: title -> form.
_MORE = {
    "ppl": {"perplexity over dense [95%]": _ratio},
    "mass": {
        "recall@K": lambda row: percent(row["value"]),
        "mass@K": lambda row: percent(row["mass_value"]),
    },
    "timing": {
        "ms a step": lambda row: f"{row['value']:.2f}",
        "ms for 1,000 prompt tokens": lambda row: f"{row['read_ms']:.1f}",
        "bytes an entry": _bytes,
    },
}


def board_markdown(spec: dict[str, Any], results: Mapping[str, Result], level: int = 2) -> str:
    """Return a board in Markdown, with a table for each K.

    Args:
        spec, results: as `board` takes them.
        level (int): of its heading. Default: ``2``.
    """
    rows = board(spec, results)
    mark = "#" * level
    lines = [f"{mark} {spec['title']}", ""]
    counts = sorted({n for r in rows for _, n in r["cells"].values()})
    if counts:
        n = " to ".join(f"{c:,}" for c in dict.fromkeys((counts[0], counts[-1])))
        lines += [
            f"Right answers of {n} in each column. The mean is over all of them, its interval Wilson's, which "
            f"takes answers as independent. ![{spec['name']}](board-{spec['name']}.png)",
            "",
        ]
    for k, table in board_tables(spec, rows).items():
        lines += [f"{mark}# K = {k:,}", "", markdown(*table), ""]
    return "\n".join(lines)
