"""Run units of work: resumable, and shared out over the processes of mlx.launch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...machine import device, versions
from ..evaluator import Progress, Result, Row
from .results import Journal, read_result, write_result

Summary = tuple[list[Row], list[Row], list[Row]]  # rows, pairs and items


@dataclass(frozen=True)
class Unit:
    """One piece of work: what it is called in the journal, and what it is about."""

    key: str
    payload: Any


class World:
    """The processes that share a run; a single one where MLX's launcher started none."""

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self.group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1

    def gather(self, value: Any) -> list[Any]:
        """Return what every process holds, in the order of their ranks."""
        if self.size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        with mx.stream(mx.cpu):
            sizes = np.array(mx.distributed.all_gather(mx.array([len(data)]), group=self.group)).tolist()
            padded = np.zeros(max(sizes), dtype=np.uint8)
            padded[: len(data)] = data
            rows = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=self.group))
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]

    def journals(self, out: str | os.PathLike) -> tuple[Path, list[Path]]:
        """Return where this process keeps its journal, and those that others have left."""
        out = Path(out)
        mine = [journal_path(out, rank) for rank in range(self.size)]
        left = sorted(set(out.parent.glob(f"{out.name}.*.jsonl")) - set(mine))
        return mine[self.rank], left if self.rank == 0 else []


class Share(World):
    """One of several processes that know nothing of each other.

    Each leaves its part of a run in a journal of its own; a later run joins them.

    Args:
        index (int): which part, from 0.
        count (int): of how many.
    """

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.count = index, count

    def part(self, units: list[Unit]) -> list[Unit]:
        """Return this part of the units: neighbours, which may have work in common."""
        n = len(units)
        return units[self.index * n // self.count : (self.index + 1) * n // self.count]

    def journals(self, out: str | os.PathLike) -> tuple[Path, list[Path]]:
        """Return where this process keeps its journal, and nothing else."""
        return journal_path(out, self.index), []


def connect() -> World:
    """Join the processes that `mlx.launch` started, if it started any."""
    group = mx.distributed.init()
    return World(group if group.size() > 1 else None)


def run_units(
    units: list[Unit],
    work: Callable[[Any], list[Row]],
    *,
    config: dict[str, Any],
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], float]:
    """Run every unit that is not in the journal yet, and return the records of all.

    Args:
        units (list of Unit): the work, the same list on every process.
        work (callable): takes a payload and returns a list of dicts fit for JSON.
        config (dict): what the run is; see `Journal`.
        out (Path): the result file; the journal stands beside it. Default: ``None``, no journal.
        world (World): the processes. Default: ``None``, this one alone.
        progress (callable): is told (units done, units in all, key). Default: ``None``.

    Returns:
        (list of dict, float): the records in the order of the units, on every process, and the
        seconds that the units took, added up over processes and sessions.
    """
    world = world or World()
    done: dict[str, list[Row]] = {}
    journal, seconds = None, 0.0
    if out:
        mine, left = world.journals(out)
        journal = Journal(mine, config)
        for found in (journal, *(Journal(path, config) for path in left)):
            done.update(found.done)
            seconds += found.seconds
    finished = {key for keys in world.gather(sorted(done)) for key in keys}
    todo = [unit for unit in units if unit.key not in finished]
    mine = todo[world.rank :: world.size]
    for i, unit in enumerate(mine):
        if progress:
            progress(len(units) - len(todo) + min(i * world.size, len(todo)), len(units), unit.key)
        start = time.perf_counter()
        records = work(unit.payload)
        took = time.perf_counter() - start
        seconds += took
        if journal:
            journal.add(unit.key, records, took)
        done[unit.key] = records
    everything: dict[str, list[Row]] = {}
    for part in world.gather(done):
        everything.update(part)
    if progress:
        progress(len(units), len(units), "done")
    records = [record for unit in units for record in everything[unit.key]]
    return records, sum(world.gather(seconds))


def journal_path(out: str | os.PathLike, rank: int = 0) -> Path:
    """Return where a process keeps the journal of a result file."""
    out = Path(out)
    return out.with_name(out.name + (f".{rank}" if rank else "") + ".jsonl")


def evaluate(
    kind: str,
    config: dict[str, Any],
    units: list[Unit],
    work: Callable[[Any], list[Row]],
    summarise: Callable[[list[Row]], Summary],
    *,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Run an evaluation and return its result.

    Args:
        kind (str): the evaluator's name.
        config (dict): everything that decides the result.
        units, work, out, world, progress: as in `run_units`.
        summarise (callable): takes all records and returns (rows, pairs, items).

    Returns:
        dict: kind, config, versions, device, wall_s (of this session), work_s (over all sessions and
        processes), rows, pairs, items. Where `out` is given it is
        also written there, by the first process, and the journals are removed; if it is there already
        and of the same config, it is returned as it is. ``None`` from a `Share`, which has a part.

    Raises:
        ValueError: if `out` is there and is another run's.
    """
    world = world or World()
    start = time.perf_counter()
    config = json.loads(json.dumps(config))
    finished = _finished(kind, config, out, world)
    if finished:
        return finished
    if isinstance(world, Share):
        units = world.part(units)
    records, seconds = run_units(units, work, config=config, out=out, world=world, progress=progress)
    if isinstance(world, Share):
        return None
    rows, pairs, items = summarise(records)
    result = {
        "kind": kind,
        "config": config,
        "versions": versions(),
        "device": {**device(), "processes": world.size},
        "wall_s": round(time.perf_counter() - start, 1),
        "work_s": round(seconds, 1),
        "rows": rows,
        "pairs": pairs,
        "items": items,
    }
    result = json.loads(json.dumps(result))
    if out:
        if world.rank == 0:
            write_result(out, result)
        world.gather(None)
        mine, left = world.journals(out)
        for path in (mine, *left):
            path.unlink()
    return result


def _finished(kind: str, config: dict[str, Any], out: str | os.PathLike | None, world: World) -> Result | None:
    """Return the result that is there already, if it is of this config; the first process looks."""
    found = None
    if out and world.rank == 0 and Path(out).exists():
        found = read_result(out)
    found = world.gather(found)[0]
    if found and (found["kind"], found["config"]) != (kind, config):
        raise ValueError(f"[{kind}] '{out}' holds another run. Choose another --out, or remove it.")
    return found
