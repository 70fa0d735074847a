"""Results as pictures: what the field draws, with intervals."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...pictures import save_picture
from ..evaluator import Result, Row, evaluator_of
from .tables import problems_name, selection_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_Series = dict[str, list[tuple[float, float, float | None, float | None]]]  # label -> x, value, low and high
_INK = "#333333"
_NONE = float("nan")  # where there is no interval, no bar is drawn
_MARKERS = "osD^vP"  # where there are more lines than colours, another for the next ones
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e09f3e", "#7b4b94", "#5c677d", "#0a9396", "#bb3e03")


def plot(result: Result, path: str | os.PathLike) -> None:
    """Draw a result as a PNG.

    Args:
        result (dict): of any evaluator.
        path (Path): where to; the folder is made.

    Raises:
        ValueError: if matplotlib is missing, or there is nothing to draw.
    """
    save_picture(lambda plt: evaluator_of(result["kind"]).plot(result, plt), path)


def plot_retention(results: list[Result], title: str, path: str | os.PathLike) -> None:
    """Draw the accuracy of needle results against retention, a panel for each, as a PNG.

    Args:
        results (list of dict): of `needle`.
        title (str): above them.
        path (Path): where to.

    Raises:
        ValueError: if matplotlib is missing.
    """
    panels = [(_setting(result), result["rows"], length) for result, length in _cells(results)]
    save_picture(lambda plt: _retention(panels, title, plt), path)


def plot_board(rows: list[Row], title: str, path: str | os.PathLike) -> None:
    """Draw the mean accuracy of every rule by budget, as a PNG.

    Args:
        rows (list of dict): of `board`.
        title (str): above it.
        path (Path): where to.

    Raises:
        ValueError: if matplotlib is missing.
    """
    save_picture(lambda plt: _board([r for r in rows if "mean" in r], title, plt), path)


def _board(rows: list[Row], title: str, plt: Any) -> Figure:
    series: _Series = {}
    for row in (r for r in rows if r["top_k"]):
        series.setdefault(row["rule"], []).append((row["top_k"], *row["mean"]))
    # The legend in the order of the lines at the largest budget.
    series = dict(sorted(series.items(), key=lambda named: -max(named[1])[1]))
    figure, axis = plt.subplots(figsize=(7.4, 4.6), layout="constrained")
    _lines(axis, series, spread=0.015)
    for row in (r for r in rows if not r["top_k"]):
        axis.axhline(row["mean"][0], color=_INK, linewidth=1, linestyle="--", label=row["rule"])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("top_k")
    axis.set_ylabel("mean accuracy, Wilson 95%")
    axis.set_title(title, fontsize=10)
    _legend(axis)
    return figure


def _cells(results: list[Result]) -> list[tuple[Result, int]]:
    return [(r, length) for r in results for length in sorted({row["length"] for row in r["rows"]})]


def _setting(result: Result) -> str:
    lengths = {row["length"] for row in result["rows"]}
    config = result["config"]
    turns = f", question {config['turns']}" if "turns" in config else ""
    return f"{config['setting']}{turns}{_begun(config)}, {min(lengths):,} tokens"


def _begun(config: dict[str, Any]) -> str:
    return ", replies begun" if config.get("stem") else ""


def plot_needle(result: Result, plt: Any) -> Figure:
    """Accuracy against retention where a kind of policy has three budgets, else a heat map."""
    kinds: dict[str, set[int | None]] = {}
    for row in result["rows"]:
        kinds.setdefault(_kind(row["policy"]), set()).add(row["top_k"])
    if max(map(len, kinds.values())) < 3:
        return _grid(result, plt)
    panels = [(f"{length:,} tokens", result["rows"], length) for _, length in _cells([result])]
    return _retention(panels, _about(result), plt)


def _about(result: Result) -> str:
    config = result["config"]
    return f"{result['kind'].capitalize()} ({config['task']}, {config['setting']}{_begun(config)})"


def _kind(label: str) -> str:
    return label.split("@")[0]


def _retention(panels: list[tuple[str, list[Row], int]], title: str, plt: Any) -> Figure:
    """Accuracy against retention: panels (title, rows, length), one line a kind of policy.

    A kind has one colour in all panels, and one entry in their legend.
    """
    kinds = dict.fromkeys(_kind(r["policy"]) for _, rows, _ in panels for r in rows if r["top_k"])
    handles: dict[str, Any] = {}
    size = (1.5 + 4 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, rows, length) in zip(axes[0], panels):
        rows = [r for r in rows if r["depth"] is None and r["length"] == length]
        series: _Series = {kind: [] for kind in kinds}
        for row in (r for r in rows if r["top_k"]):
            point = (row["top_k"], row["value"], row["low"], row["high"])
            series[_kind(row["policy"])].append(point)
        _lines(axis, series, spread=0.04)
        for row in (r for r in rows if not r["top_k"]):
            axis.axhline(row["value"], color=_INK, linewidth=1, linestyle="--", label=row["policy"])
        ticks = axis.get_xticks()
        axis.set_xticks(ticks, [f"{t:,.0f}\n1/{length / t:.3g}" for t in ticks])
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"{name}, n = {min(r['n'] for r in rows)}", fontsize=9)
        axis.set_xlabel("top_k, and its share of the context")
        axis.set_ylabel("accuracy, Wilson 95%")
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    _legend(axes[0][-1], handles.values(), handles)
    figure.suptitle(title, fontsize=10)
    return figure


def _grid(result: Result, plt: Any) -> Figure:
    """A heat map of depth and length, one panel a policy; with one length, policies side by side."""
    cells = [r for r in result["rows"] if r["depth"] is not None]
    policies = list(dict.fromkeys(r["policy"] for r in cells))
    lengths = sorted({r["length"] for r in cells})
    depths = sorted({r["depth"] for r in cells})
    found = {(r["policy"], r["length"], r["depth"]): r for r in cells}
    if len(lengths) == 1:
        panels = {f"{lengths[0]:,} tokens": [(p, p, lengths[0]) for p in policies]}
    else:
        panels = {p: [(f"{n:,}", p, n) for n in lengths] for p in policies}
    width = max(len(columns) for columns in panels.values())
    across = min(len(panels), max(1, 12 // width))
    down = -(-len(panels) // across)
    size = (1.4 + across * (0.7 + 0.8 * width), 0.9 + down * (0.8 + 0.42 * len(depths)))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, columns) in zip(axes.flat, panels.items()):
        image = _heat_map(axis, title, columns, depths, found)
    names = "policy" if len(lengths) == 1 else "context, tokens"
    figure.supxlabel(names, fontsize=9)
    figure.supylabel("depth of the fact", fontsize=9)
    counts = " to ".join(map(str, sorted({f(r["n"] for r in cells) for f in (min, max)})))
    title = f"{_about(result)}, n = {counts} a cell"
    figure.suptitle(f"{title}\naccuracy in % [Wilson 95%]", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, format=lambda v, _: f"{100 * v:.0f}%")
    return figure


def _pale_red_to_green() -> ListedColormap:
    """Return a colour map on all of which dark figures are legible."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["RdYlGn"]([0.2 + 0.6 * i / 255 for i in range(256)]))


def _heat_map(axis: Axes, title: str, columns: list[tuple], depths: list[float], found: dict[tuple, Row]) -> AxesImage:
    # Code is asked for where it stands: not at every depth.
    cells = [[found.get((policy, n, d)) for _, policy, n in columns] for d in depths]
    grid = [[cell["value"] if cell else _NONE for cell in row] for row in cells]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=_pale_red_to_green(), aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if not cell:
                continue
            interval = f"[{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"
            axis.text(
                x,
                y - 0.14,
                f"{100 * cell['value']:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color=_INK,
            )
            axis.text(x, y + 0.22, interval, ha="center", va="center", fontsize=5.5, color=_INK)
    turn = 35 if max(len(c[0]) for c in columns) > 8 else 0
    axis.set_xticks(range(len(columns)), [c[0] for c in columns], rotation=turn)
    axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
    axis.set_title(title, fontsize=9)
    return image


def _lines(axis: Axes, series: _Series, logarithmic: bool = True, spread: float = 0.0) -> None:
    """Draw {label: [(x, value, low, high)]} with error bars, lines moved apart by `spread` octaves."""
    for i, (label, points) in enumerate(series.items()):
        if not points:
            continue
        again, which = divmod(i, len(_COLOURS))
        marker, colour = _MARKERS[again % len(_MARKERS)], _COLOURS[which]
        points = sorted(points)
        shift = 2 ** (spread * (i - (len(series) - 1) / 2))
        x, y = [p[0] * shift for p in points], [p[1] for p in points]
        errors = [
            [_NONE if low is None else max(0.0, v - low) for _, v, low, _ in points],
            [_NONE if high is None else max(0.0, high - v) for _, v, _, high in points],
        ]
        axis.errorbar(x, y, yerr=errors, marker=marker, markersize=4, capsize=3, color=colour, label=label)
    ticks = sorted({p[0] for points in series.values() for p in points})
    if logarithmic:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _legend(axis: Axes, *handles: Iterable[Any]) -> None:
    """Put the legend beside an axis, where it covers nothing."""
    axis.legend(*handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_ppl(result: Result, plt: Any) -> Figure:
    """The ratio of perplexities against K, one line a kind of policy; without the dense model
    the perplexities."""
    series: _Series = {}
    top_k = {r["policy"]: r.get("top_k") for r in result["rows"]}
    beside_dense = result["config"].get("beside_dense", True)
    if beside_dense:
        pairs = (p for p in result["pairs"] if p["against"] == "dense")
        found = [(p["policy"], p["ratio"], p["ratio_low"], p["ratio_high"]) for p in pairs]
    else:
        found = [(r["policy"], r["value"], r["low"], r["high"]) for r in result["rows"] if r["n"]]
    for policy, *point in found:
        series.setdefault(_kind(policy), []).append((top_k[policy], *point))
    if not series:
        raise ValueError("[plot] the result has no sparse policy to draw.")
    figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    _lines(axis, series)
    if beside_dense:
        axis.axhline(1, color=_INK, linewidth=1, linestyle="--")
    axis.set_xlabel("top_k, keys a query")
    axis.set_ylabel(f"perplexity{' over dense' if beside_dense else ''}, bootstrap 95%")
    _legend(axis)
    config = result["config"]
    axis.set_title(f"Perplexity ({config['path']}, {config['length']:,} tokens)", fontsize=10)
    return figure


def plot_retrieval(result: Result, plt: Any) -> Figure:
    """Recall and mass against K, one line a selection."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [r for r in result["rows"] if r["layer"] is None]
    for axis, prefix, name in ((axes[0], "", "recall@K"), (axes[1], "mass_", "mass@K")):
        series: _Series = {}
        for row in rows:
            point = (row["top_k"], row[prefix + "value"], row[prefix + "low"], row[prefix + "high"])
            series.setdefault(selection_name(row["policy"]), []).append(point)
        _lines(axis, series)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("K, keys a query")
        axis.set_ylabel(f"{name}, mean over heads and layers, 95%")
    _legend(axes[-1])
    figure.suptitle(f"Selections against the true attention, {result['config']['length']:,} tokens", fontsize=10)
    return figure


def plot_memory(result: Result, plt: Any) -> Figure:
    """The cache and the program's peak against the context."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, scale, name in (
        (axes[0], "value", 1e-6, "cache, MB"),
        (axes[1], "peak_gb", 1.0, "peak of the program, GB"),
    ):
        series: _Series = {}
        for row in result["rows"]:
            value = row[key] * scale
            series.setdefault(row["policy"], []).append((row["length"], value, None, None))
        _lines(axis, series)
        axis.set_ylim(0)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(name)
    _legend(axes[-1])
    figure.suptitle("Memory by context (measured once: no interval)", fontsize=10)
    return figure


def plot_timing(result: Result, plt: Any) -> Figure:
    """Milliseconds a step and for 1,000 tokens of the prompt, a bar a policy."""
    rows = result["rows"][::-1]
    size = (10, 1.2 + 0.22 * len(rows))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    names = [r["policy"] for r in rows]
    drawn = ("value", "ms a step, median"), ("read_ms", "ms for 1,000 prompt tokens")
    for axis, (key, name) in zip(axes, drawn):
        axis.barh(names, [r[key] for r in rows], color=_COLOURS[0])
        axis.set_xlabel(name)
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(f"Time, {rows[0]['length']:,} tokens", fontsize=10)
    return figure


def plot_gsm8k(result: Result, plt: Any) -> Figure:
    """Accuracy of each policy, by both readings."""
    policies = list(dict.fromkeys(r["policy"] for r in result["rows"]))
    figure, axis = plt.subplots(figsize=(1.8 + 0.9 * len(policies), 3.4), layout="constrained")
    for i, reading in enumerate(("strict", "flexible")):
        rows = [r for r in result["rows"] if r["reading"] == reading]
        x = [j + 0.36 * i - 0.18 for j in range(len(rows))]
        y = [100 * r["value"] for r in rows]
        errors = [
            [100 * (r["value"] - r["low"]) for r in rows],
            [100 * (r["high"] - r["value"]) for r in rows],
        ]
        axis.bar(x, y, 0.34, yerr=errors, capsize=3, color=_COLOURS[i], label=reading)
    axis.set_xticks(range(len(policies)), policies, rotation=20)
    axis.set_ylim(0, 105)
    axis.set_ylabel("accuracy in %, Wilson 95%")
    _legend(axis)
    title = f"Word problems ({problems_name(result)}), n = {result['rows'][0]['n']}"
    axis.set_title(textwrap.fill(title, 36), fontsize=10)
    return figure
