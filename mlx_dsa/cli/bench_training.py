"""What mlx-dsa bench --train runs and shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

from ..bench import bench_training
from ..bench.training import PARTS, RECIPE
from ..train import RetentionConfig, TrainConfig
from .eval.show import print_table
from .progress import counting_bar
from .subject import Subject

# What names a model; the options of sparse attention change nothing here.
_KNOWN = ("preset", "model", "config", "model_shape", "bits")


def check_options(given: dict[str, Any]) -> None:
    """Raise a UsageError if an option would have no effect on training."""
    for name, value in given.items():
        if value is not None and name not in _KNOWN:
            option = "cold" if name == "cold_file" else name.replace("_", "-")
            raise click.UsageError(f"--{option} has no effect with --train. Leave it out.")


def run_training(
    subject: Subject,
    contexts: list[int],
    of: tuple[str, ...],
    steps: int,
    chunk: int | None,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Time training and show a table.

    Args:
        subject (Subject): Whose model to train for.
        contexts (list of int): Tokens of a sequence.
        of (tuple of str): What to train, each in runs of its own.
        steps (int): Steps that count.
        chunk (int, optional): Tokens a chunk of the teacher's pass; ``None`` for what
          train takes.
        write (callable): Takes each row as it is measured.

    Returns:
        dict: ``rows``, and the settings of ``training``.
    """
    model = subject.load_model()
    chunk = chunk or TrainConfig.chunk_size
    shape = {name: RECIPE[name] for name in RECIPE if name != "retention_dim"}
    config = TrainConfig(**shape, chunk_size=chunk)
    retention = RetentionConfig(retention_dim=RECIPE["retention_dim"], chunk_size=chunk)
    console, rows = Console(stderr=True), []
    with counting_bar(console) as progress:
        found = bench_training(
            model,
            contexts,
            config,
            retention,
            of=of,
            steps=steps,
            progress=progress,
        )
        for row in found:
            rows.append(row)
            write(row)
            console.print(
                f"{row['context']:,} tokens, {row['of']}: {row['tokens_s']:,.0f} tokens/s, "
                f"peak {row['peak_memory_gb']:.2f} GB",
                highlight=False,
            )
    print_table(*_table(rows))
    settings = {**RECIPE, "chunk_size": chunk, "query_rows": config.query_rows}
    return {"rows": rows, "training": settings}


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["tokens", "trained", "tokens/s", "s a step", *PARTS, "peak GB", "10M tokens"]
    cells = []
    for row in rows:
        cells.append(
            [
                f"{row['context']:,}",
                row["of"],
                f"{row['tokens_s']:,.0f}",
                f"{row['step_s']:.3f}",
                *(f"{row['parts_s'][part]:.3f}" for part in PARTS),
                f"{row['peak_memory_gb']:.2f}",
                f"{row['hours_10m_tokens']:,.1f} h",
            ]
        )
    return header, cells
