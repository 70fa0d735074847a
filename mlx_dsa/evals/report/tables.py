"""Results as tables of text, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..evaluator import Result, Row, Table, evaluator_of


def table(result: Result) -> Table:
    """Return the header and the rows of a result's main table, all strings."""
    return evaluator_of(result["kind"]).table(result)


def pairs_table(result: Result) -> Table | None:
    """Return the header and the rows of a result's comparisons in pairs, or ``None``."""
    pairs = result["pairs"]
    build = evaluator_of(result["kind"]).pairs
    return build(pairs) if pairs and build else None


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(result: Result) -> str | None:
    """Return what a table must not be read without, or ``None``."""
    note = evaluator_of(result["kind"]).note
    return note and note(result)


def begun_note(result: Result) -> str | None:
    """Return what a table of answers must not be read without, or ``None``."""
    if result["config"].get("stem"):
        return "Each reply is begun for the model, up to the value or to the function's name."
    return None


def problems_note(result: Result) -> str:
    """Return which word problems were solved."""
    return f"{result['rows'][0]['n']:,} word problems: {problems_name(result)}."


def problems_name(result: Result) -> str:
    """Return whose word problems a result is about."""
    data = result["config"]["data"]
    return {
        "bundled problems": "bundled ones, not those of GSM8K",
        "gsm8k": "GSM8K's test set",
    }.get(data, data)


def selection_name(method: str) -> str:
    """Return what tables call a selection: the policy "index" is an order of eviction."""
    return {"index": "indexer"}.get(method, method)


def percent(value: float, low: float | None = None, high: float | None = None) -> str:
    """Return a share in percent, with its interval if there is one."""
    text = f"{100 * value:.1f}%"
    return text if low is None or high is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def _with_interval(value: float, low: float | None, high: float | None, form: str, scale: float = 1.0) -> str:
    """Return a number with its bootstrap interval, which a single text does not give."""
    text = format(scale * value, form)
    if low is None or high is None:
        return f"{text} [one text]"
    return f"{text} [{format(scale * low, form)}, {format(scale * high, form)}]"


def _share(value: float, low: float | None, high: float | None) -> str:
    return percent(value, low, high) + (" [one text]" if low is None else "")


def _shares(config: dict[str, Any] | None, length: int) -> tuple[float, float]:
    """Return which shares of a context a policy keeps, and reads at a step."""
    if config is None:
        return 1.0, 1.0
    read = min(1.0, config["top_k"] / length)
    return (read if config["cache"] == "budget" else 1.0), read


def needle_table(result: Result) -> Table:
    header = [
        "policy",
        "context",
        "kept",
        "read a step",
        "n",
        "accuracy [95%]",
        "read, s",
        "peak, GB",
        "wrong answers",
    ]
    turns = "first_turn" in result["rows"][0]
    if turns:
        header.insert(5, "first turn")
    shares = {(p["policy"], p["length"]): p for p in result["pairs"] if p["against"] == "dense"}
    if shares:
        header.insert(header.index("read, s"), "of dense [95%]")
    configs = {p["label"]: p["config"] for p in result["config"]["policies"]}
    rows = []
    for row in (r for r in result["rows"] if r["depth"] is None):
        lost = ", ".join(f"{n} {state}" for state, n in sorted(row.get("verdicts", {}).items()))
        rows.append(
            [
                row["policy"],
                f"{row['length']:,}",
                *map(percent, _shares(configs[row["policy"]], row["length"])),
                str(row["n"]),
                *([percent(row["first_turn"])] if turns else []),
                percent(row["value"], row["low"], row["high"]),
                *([of_dense(shares.get((row["policy"], row["length"])))] if shares else []),
                f"{row['read_s']:.2f}",
                "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}",
                lost or ("-" if row["value"] == 1 else f"{round(row['n'] * (1 - row['value']))}"),
            ]
        )
    return header, rows


def of_dense(pair: Row | None) -> str:
    """Return the share of what the dense model answers right that a policy does too."""
    if pair is None or pair["retained"] is None:
        return "-"
    return percent(pair["retained"], pair["retained_low"], pair["retained_high"])


def ppl_table(result: Result) -> Table:
    header = [
        "policy",
        "top_k",
        "tokens scored",
        "perplexity [95%]",
        "dense there",
        "ratio [95%]",
        "KL",
        "same top token",
    ]
    pairs = {p["policy"]: p for p in result["pairs"] if p["against"] == "dense"}
    dense = {r["beside"]: r for r in result["rows"] if r["policy"] == "dense"}
    rows = []
    for row in (r for r in result["rows"] if r["policy"] != "dense"):
        if not row["n"]:
            rows.append([row["policy"], str(row["top_k"]), "0", *["-"] * 5])
            continue
        found = [
            row["policy"],
            str(row["top_k"]),
            f"{row['n']:,}",
            _with_interval(row["value"], row["low"], row["high"], ".2f"),
        ]
        pair = pairs.get(row["policy"])
        if pair is None:  # the dense model was not run
            rows.append([*found, *["-"] * 4])
            continue
        rows.append(
            [
                *found,
                f"{dense[row['policy']]['value']:.2f}",
                _with_interval(pair["ratio"], pair["ratio_low"], pair["ratio_high"], ".4f"),
                f"{row['kl']:.4f}",
                percent(row["same_top"]),
            ]
        )
    return header, rows


def gsm8k_table(result: Result) -> Table:
    header = [
        "policy",
        "reading",
        "n",
        "accuracy [95%]",
        "truncated",
        "prompt longer than top_k",
        "something dropped",
    ]
    rows = [
        [
            row["policy"],
            row["reading"],
            str(row["n"]),
            percent(row["value"], row["low"], row["high"]),
            percent(row["truncated"]),
            "-" if row["longer_than_top_k"] is None else percent(row["longer_than_top_k"]),
            percent(row["dropped"]),
        ]
        for row in result["rows"]
    ]
    return header, rows


def retrieval_table(result: Result) -> Table:
    header = [
        "selection",
        "K",
        "queries",
        "recall@K [95%]",
        "worst head",
        "mass@K [95%]",
        "worst head",
        "over the attention's own",
        "worst layer",
    ]
    rows = []
    for row in (r for r in result["rows"] if r["layer"] is None):
        rows.append(
            [
                selection_name(row["policy"]),
                str(row["top_k"]),
                str(row["n"]),
                _share(row["value"], row["low"], row["high"]),
                percent(row["worst"]),
                _share(row["mass_value"], row["mass_low"], row["mass_high"]),
                percent(row["mass_worst"]),
                *over_attention(result, row["policy"], row["top_k"]),
            ]
        )
    return header, rows


def over_attention(result: Result, method: str, k: int) -> tuple[str, str]:
    """Return a selection's mass over that of the attention's own: mean of layers, worst layer."""
    mass = {(r["policy"], r["layer"]): r["mass_value"] for r in result["rows"] if r["top_k"] == k}
    layers = sorted({layer for _, layer in mass} - {None})
    over = {i: mass[method, i] / mass["attention", i] for i in layers}
    worst = min(over, key=over.__getitem__)
    return f"{sum(over.values()) / len(over):.3f}", f"{over[worst]:.3f} (layer {worst})"


def memory_table(result: Result) -> Table:
    header = [
        "policy",
        "context",
        "entries a layer",
        "cache, MB",
        "computed, MB",
        "active, GB",
        "peak, GB",
    ]
    rows = [
        [
            row["policy"],
            f"{row['length']:,}",
            " to ".join(f"{n:,}" for n in sorted({min(row["entries"]), max(row["entries"])})),
            f"{row['value'] / 1e6:.2f}",
            "-" if row["computed"] is None else f"{row['computed'] / 1e6:.2f}",
            f"{row['active_gb']:.3f}",
            f"{row['peak_gb']:.3f}",
        ]
        for row in result["rows"]
    ]
    return header, rows


def proportions(columns: Sequence[str]) -> Callable[[list[Row]], Table]:
    def build(pairs: list[Row]) -> Table:
        header = [
            "policy",
            "against",
            *columns,
            "n",
            "difference",
            "only first",
            "only second",
            "p",
            "could have shown",
            "right where it is [95%]",
        ]
        rows = [
            [
                pair["policy"],
                pair["against"],
                *(f"{pair[c]:,}" if isinstance(pair[c], int) else pair[c] for c in columns),
                str(pair["n"]),
                f"{100 * pair['difference']:+.1f} points",
                str(pair["only_first"]),
                str(pair["only_second"]),
                f"{pair['p']:.3g}",
                "-" if pair["smallest_difference"] is None else f"{100 * pair['smallest_difference']:.1f} points",
                "-"
                if pair["retained"] is None
                else percent(pair["retained"], pair["retained_low"], pair["retained_high"]),
            ]
            for pair in pairs
        ]
        return header, rows

    return build


def ppl_pairs(pairs: list[Row]) -> Table:
    header = ["policy", "against", "tokens", "over", "difference in NLL [95%]"]
    rows = [
        [
            pair["policy"],
            pair["against"],
            f"{pair['n']:,}",
            next(f"{pair[u]} {u}" for u in ("documents", "windows") if u in pair),
            _with_interval(pair["difference"], pair["low"], pair["high"], "+.4f"),
        ]
        for pair in pairs
    ]
    return header, rows


def retrieval_pairs(pairs: list[Row]) -> Table:
    header = ["selection", "against", "K", "texts", "difference in recall [95%]"]
    rows = [
        [
            selection_name(pair["policy"]),
            pair["against"],
            str(pair["top_k"]),
            str(pair["texts"]),
            _with_interval(pair["difference"], pair["low"], pair["high"], "+.1f", 100) + " points",
        ]
        for pair in pairs
    ]
    return header, rows


def memory_pairs(pairs: list[Row]) -> Table:
    header = ["policy", "against", "context", "cache"]
    return header, [[p["policy"], p["against"], f"{p['length']:,}", f"{p['ratio']:.3f} times"] for p in pairs]


def timing_table(result: Result) -> Table:
    header = ["policy", "context", "ms a step (least, most)", "ms for 1,000 prompt tokens", "bytes an entry"]
    return header, [
        [r["policy"], f"{r['length']:,}", f"{r['value']:.2f} ({r['low']:.2f}, {r['high']:.2f})", f"{r['read_ms']:.1f}",
         "-" if r["entry_bytes"] is None else f"{r['entry_bytes']:,.0f}"]
        for r in result["rows"]
    ]  # fmt: skip
