"""What mlx-dsa bench --rows runs and shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ..bench import bench_rows
from ..crossovers import resolve_auto
from .eval.show import print_table
from .progress import counting_bar
from .subject import Subject


def run_rows(
    subject: Subject, contexts: list[int], rows: list[int], alone: bool, options: dict[str, Any], write: Callable
) -> dict[str, Any]:
    """Time decode of several conversations at once, and show a table.

    Args:
        subject (Subject): Whose model to time.
        contexts (list of int): Tokens that each conversation has seen.
        rows (list of int): Conversations.
        alone (bool): No dense passes.
        options (dict): ``repeats``, ``steps`` and ``chunk`` of :func:`bench_rows`.
        write (callable): Takes each pass and row as it is measured.

    Returns:
        dict: ``rows``, ``passes``, and the ``config`` that ran.
    """
    model, indexers = subject.load()
    config = resolve_auto(subject.config, indexers)
    console, found, passes = Console(stderr=True), [], []
    with counting_bar(console) as progress:

        def report(line: dict[str, Any]) -> None:
            write(line)
            passes.append(line)
            console.print(
                f"{line['rows']} rows of {line['context']:,} tokens, {line['kind']}: "
                f"{line['decode_ms']:.2f} ms a step, {line['tokens_s']:,.0f} tokens/s",
                highlight=False,
            )

        for row in bench_rows(
            model, indexers, config, contexts, rows, **options, beside_dense=not alone, report=report, progress=progress
        ):
            found.append(row)
            write(row)
    print_table(*_table(found))
    return {"rows": found, "passes": passes, "config": asdict(config)}


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["tokens", "rows", "", "decode ms", "tokens/s", "memory GB", "peak GB"]
    cells = []
    for row in rows:
        kinds = [kind for kind in ("dense", "sparse") if kind in row]
        for kind in kinds:
            r, first = row[kind], kind == kinds[0]
            names = [f"{row['context']:,}", str(row["rows"])] if first else ["", ""]
            memory = [f"{r[name]:.3f}" for name in ("active_memory_gb", "peak_memory_gb")]
            cells.append([*names, kind, f"{r['decode_ms']:.2f}", f"{r['tokens_s']:,.0f}", *memory])
        if "speedup" in row:
            cells.append(["", "", "speed-up", f"x{row['speedup']:.2f}", "", "", ""])
    return header, cells
