"""Result files: a journal of JSON lines while a run goes on, one JSON when it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...files import write_text
from ..evaluator import Result, Row


class Journal:
    """The records of a run in progress, one JSON line for each finished unit of work.

    A run that is killed leaves at most one half-written line, which is dropped on opening, so that
    the run goes on with the first unit that the journal does not hold.

    Args:
        path (Path): the file; it is made if it is not there.
        config (dict): what the run is; a journal of another run is refused.
    """

    def __init__(self, path: str | os.PathLike, config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[str, list[Row]] = {}
        self.seconds = 0.0  # that the units took
        config = json.loads(json.dumps(config))
        if self.path.exists():
            self._read(config)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"config": config})

    def _read(self, config: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._append({"config": config})
            return
        found = lines[0].get("config", {})
        differ = sorted(k for k in {*found, *config} if found.get(k) != config.get(k))
        if differ:
            raise ValueError(
                f"[Journal] '{self.path}' holds an interrupted run with other settings "
                f"({', '.join(differ)}). Remove it, or choose another --out."
            )
        self.done = {line["unit"]: line["records"] for line in lines[1:]}
        self.seconds = sum(line["seconds"] for line in lines[1:])

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, unit: str, records: list[Row], seconds: float) -> None:
        """Store the records of a finished unit, and how long it took."""
        self._append({"unit": unit, "seconds": round(seconds, 3), "records": records})
        self.done[unit] = json.loads(json.dumps(records))


def write_result(path: str | os.PathLike, result: Result) -> None:
    """Write a result as JSON with one row, pair or item on each line."""
    lists = ("rows", "pairs", "items")
    parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result.items() if k not in lists]
    for name in lists:
        lines = ",\n".join(json.dumps(entry) for entry in result.get(name, []))
        parts.append(f'"{name}": [\n{lines}\n]' if lines else f'"{name}": []')
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_result(path: str | os.PathLike) -> Result:
    """Read a result file.

    Raises:
        ValueError: if there is no such file, or it is not a result.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"[results] '{path}' is not there.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"[results] '{path}' cannot be read as JSON: {error}.") from None
    missing = [k for k in ("kind", "config", "rows", "items") if not isinstance(result, dict) or k not in result]
    if missing:
        raise ValueError(f"[results] '{path}' is not a result of mlx-dsa eval: it has no {', '.join(missing)}.")
    return result
