"""mlx-dsa bench: dense against sparse, on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from rich.console import Console

from ..bench import TRAINED, OpsShape, bench_ops, check_contexts
from ..bench import bench as run_bench
from ..bench.plot import plot as draw
from ..crossovers import resolve_auto
from ..families import family_of
from ..files import write_text
from ..machine import device, runs_float32, versions
from .bench_rows import run_rows
from .bench_training import check_options, run_training
from .command import Command
from .eval.options import Numbers
from .eval.show import print_table
from .options import plot_option
from .outputs import OutputPath
from .progress import counting_bar
from .subject import Subject, open_subject, subject_options


@click.command(cls=Command)
@click.option(
    "--contexts",
    type=Numbers(),
    metavar="N,...",
    default="4096,8192",
    show_default=True,
    help="Tokens of the prompts.",
)
@click.option("--ops", is_flag=True, help="Time the operations of prefill one by one.")
@click.option(
    "--rows",
    type=Numbers(),
    metavar="N,...",
    help="Time decode of so many conversations at once, by mlx-lm's BatchGenerator.",
)
@click.option("--train", is_flag=True, help="Time steps of mlx-dsa train, which needs no indexers.")
@click.option(
    "--of",
    type=click.Choice(TRAINED),
    multiple=True,
    help="With --train: what is trained. More than once to compare.  [default: both]",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    help="Passes of each kind, taken in turns; their medians count.  [default: 3]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps of decode that count, rounded up to blocks of 256; with --train steps of training.  [default: 256; 3]",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    help="Tokens of the prompt that are read at once.  [default: 2048; with --train 512]",
)
@click.option(
    "--alone",
    is_flag=True,
    help="No dense passes, for prompts that are too long for them.",
)
@click.option(
    "--out",
    metavar="FILE.json",
    type=OutputPath(),
    help="Write the results; FILE.jsonl holds them as they come.",
)
@plot_option
@subject_options
def bench(
    contexts: list[int],
    ops: bool,
    rows: list[int] | None,
    train: bool,
    of: tuple[str, ...],
    repeats: int | None,
    steps: int | None,
    chunk: int | None,
    alone: bool,
    out: str | None,
    plot: str | None,
    **given: Any,
) -> None:
    """Time dense mlx-lm and sparse attention on the same prompts, in turns.

    Both read prompts of random tokens and then decode. Without --out the last line
    of standard output is the result as one JSON. With --train no sparse attention is
    timed but the training of what it needs.
    """
    if train:
        _refuse("train", ops=ops, rows=rows, repeats=repeats, alone=alone, plot=plot)
        check_options(given)
    elif of:
        raise click.UsageError("--of goes with --train.")
    if ops:
        _refuse("ops", rows=rows, steps=steps, alone=alone, plot=plot)
    if rows:
        _refuse("rows", plot=plot)
    subject = open_subject(**given)
    config = {"model": subject.name, **({} if train else asdict(subject.config))}
    config["contexts"] = contexts
    with _journal(out) as write:
        if train:
            config["steps"] = steps = steps or 3
            result = run_training(subject, contexts, of or TRAINED[:1], steps, chunk, write)
        else:
            repeats, chunk = repeats or 3, chunk or 2048
            config |= {"repeats": repeats, "chunk": chunk}
            if ops:
                result = _ops(subject, contexts, repeats, chunk, write)
            else:
                config["steps"] = steps = steps or 256
                options: dict[str, Any] = {"repeats": repeats, "steps": steps, "chunk": chunk}
                if rows:
                    config["rows"] = rows
                    result = run_rows(subject, contexts, rows, alone, options, write)
                else:
                    result = _end_to_end(subject, contexts, alone, options, write)
                config |= result.pop("config")
        result |= {"config": config, "device": device(), "versions": versions()}
        if out:
            write_text(out, json.dumps(result, indent=1) + "\n")
    if plot:
        name = result["device"].get("device_name", result["device"]["device"])
        draw(result["rows"], f"{subject.name}, top_k {subject.config.top_k}, {name}", plot)
    for path in filter(None, (out, plot)):
        click.echo(f"Wrote {path}")
    if not out:
        click.echo(json.dumps(result))


def _refuse(kind: str, **given: Any) -> None:
    """Raise a UsageError if an option has no effect with ``--kind``."""
    for name, value in given.items():
        if value:
            raise click.UsageError(f"--{name} has no effect with --{kind}. Leave one of them out.")


@contextmanager
def _journal(out: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write each measurement as it comes; the file goes when all are in the result."""
    if out is None:
        yield lambda line: None
        return
    path = Path(out).with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield write
    path.unlink()


def _end_to_end(
    subject: Subject, contexts: list[int], alone: bool, options: dict[str, Any], write: Callable
) -> dict[str, Any]:
    model, indexers = subject.load()
    config = resolve_auto(subject.config, indexers)
    check_contexts(contexts, options["steps"], model)
    for context in contexts:
        if context <= config.top_k:
            click.echo(
                f"Note: {context:,} tokens are no more than top_k {config.top_k:,}: sparse attention is dense there.",
                err=True,
            )
    console = Console(stderr=True)
    rows, passes = [], []
    with counting_bar(console) as progress:

        def report(line: dict[str, Any]) -> None:
            write(line)
            passes.append(line)
            decode = sum(line["decode_ms"]) / len(line["decode_ms"])
            console.print(
                f"{line['context']:,} tokens, {line['kind']}: first token "
                f"{line['ttft_s']:.3f} s, decode {decode:.2f} ms a token",
                highlight=False,
            )

        found = run_bench(
            model,
            indexers,
            config,
            contexts,
            **options,
            beside_dense=not alone,
            report=report,
            progress=progress,
        )
        for row in found:
            rows.append(row)
            write(row)
    print_table(*_table(rows))
    return {"rows": rows, "passes": passes, "config": asdict(config)}


def _ops(subject: Subject, contexts: list[int], repeats: int, chunk: int, write: Callable) -> dict[str, Any]:
    shape, config = _ops_shape(subject), subject.config
    console = Console(stderr=True)

    def report(row: dict[str, Any]) -> None:
        write(row)
        console.print(f"{row['context']:,} keys measured", highlight=False)
        for name, reason in row.get("failed", {}).items():
            console.print(f"{name} failed: {reason}", highlight=False, markup=False)

    result = bench_ops(
        contexts,
        shape,
        report,
        chunk=chunk,
        top_k=config.top_k,
        tile_size=config.tile_size,
        n_sink=config.n_sink,
        n_recent=config.n_recent,
        backend=config.backend,
        repeats=repeats,
    )
    print_table(*_ops_table(result["rows"]))
    return result


def _ops_shape(subject: Subject) -> OpsShape:
    if subject.shape is not None:  # without making the model
        shape = subject.shape
        heads = shape.n_heads, shape.n_kv_heads, shape.head_dim
        dtype = mx.float32 if runs_float32() else mx.bfloat16
        return OpsShape(*heads, *shape.indexer[:2], dtype)
    model, indexers = subject.load()
    number, indexer = next(iter(indexers.items()))
    layer = family_of(model).layers(model)[number]
    return OpsShape(
        layer.n_heads,
        layer.n_kv_heads,
        layer.head_dim,
        indexer.args.index_n_heads,
        indexer.args.index_head_dim,
        layer.dtype,
    )


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["tokens", "", "prefill s", "tokens/s", "first token s", "decode ms"]
    header += ["memory GB", "peak GB"]
    cells = []
    for row in rows:
        kinds = [kind for kind in ("dense", "sparse") if kind in row]
        for kind in kinds:
            r = row[kind]
            cells.append(
                [
                    f"{row['context']:,}" if kind == kinds[0] else "",
                    kind,
                    f"{r['prefill_s']:.3f}",
                    f"{r['prefill_tokens_s']:,.0f}",
                    f"{r['ttft_s']:.3f}",
                    f"{r['decode_ms']:.2f}",
                    f"{r['active_memory_gb']:.3f}",
                    f"{r['peak_memory_gb']:.3f}",
                ]
            )
        if "dense" not in row:
            continue
        speedup = row["speedup"]
        times = (f"x{speedup[n]:.2f}" for n in ("prefill", "prefill", "ttft", "decode"))
        cells.append(["", "speed-up", *times, "", ""])
    return header, cells


_STEPS = ("dense", "score", "select", "gather", "sdpa", "attend", "sparse")


def _ops_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["keys", "ms a layer", *_STEPS, "speed-up"]
    cells = []
    for row in rows:
        times = ["failed" if row[n] is None else f"{row[n]:.3f}" for n in _STEPS]
        speedup = "" if row["speedup"] is None else f"x{row['speedup']:.2f}"
        cells.append([f"{row['context']:,}", row["backend"], *times, speedup])
        cells.append(["", "floor", *(f"{row['floor'][n]:.3f}" for n in _STEPS), ""])
    return header, cells
