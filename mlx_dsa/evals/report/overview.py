"""Tables over several runs of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluator import Result, Table, evaluator_of
from .tables import of_dense, over_attention, percent


def check_cells(spec: dict[str, Any], kinds: Mapping[str, str]) -> None:
    """Refuse a table whose cells are no cells, or of runs that have nothing to show in one.

    Args:
        spec (dict): as `overview` takes it.
        kinds (dict): from runs to their kinds.
    """
    for row, cells in spec["rows"].items():
        where = f"[suite] table '{spec['title']}': row {row!r}"
        if not isinstance(cells, list) or len(cells) != len(spec["columns"]):
            raise ValueError(f"{where} must have a cell for each column.")
        for cell in cells:
            if not isinstance(cell, list) or len(cell) != 2:
                raise ValueError(f"{where}: a cell must be a run and a policy, or K, but got {cell!r}.")
            if cell[0] not in kinds:
                raise ValueError(f"{where}: there is no run {cell[0]!r}: the runs are {', '.join(kinds)}.")
            if evaluator_of(kinds[cell[0]]).cell is None:
                raise ValueError(f"{where}: a run of kind {kinds[cell[0]]} has no cell.")


def check_labels(spec: dict[str, Any], labels: Mapping[str, Sequence[str | int]]) -> None:
    """Refuse a table of policies that its runs don't have.

    Args:
        spec (dict): as `overview` takes it.
        labels (dict): from runs to the labels of their policies, or the K of their selections.
    """
    for row, cells in spec["rows"].items():
        for run, label in cells:
            if label not in labels[run]:
                raise ValueError(
                    f"[suite] table '{spec['title']}': row {row!r}: run '{run}' has no {label!r}: it has "
                    f"{', '.join(map(str, labels[run]))}."
                )


def overview(spec: dict[str, Any], results: Mapping[str, Result]) -> Table:
    """Return a table of several runs, a cell for each run and policy, as a header and rows.

    Args:
        spec (dict): "columns", their names, and "rows", from a name to a cell for each column: a run
            and the label of a policy in it, or the K of a selection.
        results (dict): from runs to their results.
    """
    rows = []
    for name, cells in spec["rows"].items():
        rows.append([name, *(_cell(results[run], label) for run, label in cells)])
    return ["", *spec["columns"]], rows


def _cell(result: Result, label: str | int) -> str:
    cell: Any = evaluator_of(result["kind"]).cell  # check_cells has found one
    return cell(result, label)


def mass_cell(result: Result, k: int) -> str:
    """Return a selection's mass over that of the attention's own."""
    return "; worst ".join(over_attention(result, "index", k))


def ppl_cell(result: Result, label: str) -> str:
    """Return by how much a policy's perplexity is above the dense model's."""
    pair = next((p for p in result["pairs"] if p["policy"] == label and p["against"] == "dense"), None)
    if pair is None:
        row = next(r for r in result["rows"] if r["policy"] == label)
        return f"{row['value']:.1f}" if row["n"] else "-"  # nothing was dropped
    ends = (f"{100 * (pair[k] - 1):+.1f}" for k in ("ratio_low", "ratio_high") if pair[k] is not None)
    return f"{100 * (pair['ratio'] - 1):+.1f}% [{', '.join(ends) or 'one text'}]"


def answers_cell(result: Result, label: str) -> str:
    """Return what a policy answers right of what the dense model does, and of all."""
    rows = {r["policy"]: r for r in result["rows"] if r.get("depth") is None}
    if label == "dense":
        return percent(rows["dense"]["value"], rows["dense"]["low"], rows["dense"]["high"])
    pair = next((p for p in result["pairs"] if p["policy"] == label and p["against"] == "dense"), None)
    if "dense" not in rows:
        return f"{percent(rows[label]['value'], rows[label]['low'], rows[label]['high'])} of all"
    return f"{of_dense(pair)}; {percent(rows[label]['value'])} of all"
