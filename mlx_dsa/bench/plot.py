"""A picture of what a bench measured: times and speed-ups by context."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..pictures import save_picture

_COLOURS = {"dense": "#5c677d", "sparse": "#1b6ca8"}
_PANELS = (
    ("prefill_s", "Prefill", "seconds"),
    ("decode_ms", "Decode", "ms a token"),
    ("peak_memory_gb", "Peak memory", "GB"),
)
_ROOM = 1.06  # above the highest mark
_SPEEDUPS = {"prefill": "#1b6ca8", "ttft": "#e09f3e", "decode": "#d1495b"}


def plot(rows: Sequence[dict[str, Any]], title: str, path: str | os.PathLike):
    """Draw rows of :func:`bench` as a PNG.

    Args:
        rows (sequence of dict): At least one.
        title (str): What was measured, on what.
        path (str or PathLike): Where to; the folder is made.

    Raises:
        ValueError: If matplotlib is missing.
    """
    rows = sorted(rows, key=lambda row: row["context"])
    save_picture(lambda plt: _figure(rows, title, plt), path, font_size=10)


def _figure(rows, title, plt):
    contexts = [row["context"] for row in rows]
    compared = all("dense" in row for row in rows)
    figure, axes = plt.subplots(1, 3 + compared, figsize=(14, 3.6), layout="constrained")
    for axis, (key, name, unit) in zip(axes, _PANELS):
        for kind, colour in _COLOURS.items():
            if kind not in rows[0]:
                continue
            values = [row[kind][key] for row in rows]
            axis.plot(contexts, values, "o-", color=colour, label=kind)
        axis.set(title=name, ylabel=unit)
        axis.set_ylim(0, _ROOM * axis.dataLim.ymax)
    if compared:
        _speedups(axes[3], contexts, rows)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [_tokens(n) for n in contexts])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.legend(frameon=False)
        axis.grid(axis="y", color="#e5e5e5")
    figure.suptitle(title)
    return figure


def _speedups(axis, contexts, rows):
    for name, colour in _SPEEDUPS.items():
        values = [row["speedup"][name] for row in rows]
        line = "o--" if name == "ttft" else "o-"  # it lies close to prefill
        axis.plot(contexts, values, line, color=colour, label=name)
    axis.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
    axis.set(title="Speed-up over dense", ylabel="times as fast")
    axis.set_ylim(0, _ROOM * axis.dataLim.ymax)


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"
