"""Which layers bear being sparse: each layer's mass@K, its loss when it alone is, and what leaving the
worst ones dense is worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..config import SparseConfig
from ..machine import device, versions
from ..pictures import save_picture
from ..presets import Preset
from .each_rule import SELECT
from .evaluator import Progress, Result, Row, Table
from .key_retrieval import retrieval
from .perplexity import ppl
from .policies import Policy
from .running.results import read_result, write_result
from .running.runner import World
from .subject import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = ("mass", "alone", "curve")


def coverage(
    subject: Preset,
    *,
    top_k: int = 256,
    select: str = "lightning",
    length: int = 2048,
    limit: int | None = 4,
    queries: int = 64,
    within: float = 1.0,
    data: str | None = None,
    batch_size: int = 1,
    seed: int = 0,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure each layer's selection, and the perplexity by which layers are left dense.

    Nothing is evicted and every query selects its own keys (cache "full", prefill "exact"). The curve
    leaves dense first the layer that costs most when it alone is sparse, then the next.

    Args:
        subject (Preset): the model with its tokenizer, indexers and config.
        top_k (int): keys a query. Default: ``256``.
        select (str): the rule of selecting. Default: ``"lightning"``.
        length (int): tokens of a text. Default: ``2048``.
        limit (int): texts. Default: ``4``.
        queries (int): positions a text at which mass is measured. Default: ``64``.
        within (float): percent by which perplexity may be above dense: the fewest dense layers that
            keep it there are proposed. Default: ``1.0``.
        data (str): as `load_documents` takes it. Default: ``None``, the bundled books.
        batch_size, seed, name, world, progress: as in `ppl`.
        out (str): the result's file. Its parts are results of their own beside it, by which an
            interrupted run goes on. Default: ``None``.

    Returns:
        dict: the result: "rows", one a layer ("mass", that over the attention's own "mass_over", and
        "ratio" of perplexities when it alone is sparse, with an interval), "pairs", one for each number
        of dense layers from none ("n_dense", "dense_layers", "ratio"), and "proposal", the
        layers to leave dense.

    Raises:
        ValueError: if a value is out of range, or there are fewer than two layers to choose from.
    """
    if not within >= 0:
        raise ValueError(f"[coverage] 'within' must be at least 0 but got {within}.")
    layers = sorted(i for i in subject.indexers if i not in subject.config.dense_layers)
    if len(layers) < 2:
        raise ValueError("[coverage] the model has fewer than two layers that may be sparse.")
    before = subject.config
    base = SparseConfig(
        top_k=top_k,
        n_sink=before.n_sink,
        n_recent=min(before.n_recent, max(1, top_k // 4)),
        cache="full",
        prefill="exact",
        select=select,
        backend=before.backend,
    )
    texts = {"length": length, "data": data, "limit": limit, "seed": seed}
    config = {
        **describe(subject, name),
        **texts,
        "data": data or "bundled books",
        "queries": queries,
        "within": within,
        "batch_size": batch_size,
        "select": select,
        "top_k": top_k,
        "n_recent": base.n_recent,
    }
    if out and Path(out).exists():
        found = read_result(out)
        if (found["kind"], found["config"]) != ("coverage", config):
            raise ValueError(f"[coverage] '{out}' holds another run. Choose another --out, or remove it.")
        return found
    start = perf_counter()
    files = {part: out and Path(out).with_suffix(f".{part}.json") for part in _PARTS}

    def given(part: str) -> dict[str, Any]:
        told = progress and (lambda done, total, key: progress(done, total, f"{part}: {key}"))
        return {**texts, "name": name, "out": files[part], "world": world, "progress": told}

    def measured(part: str, kept: Mapping[str, Sequence[int]]) -> Result:
        """Return the pairs with dense of policies that leave some layers dense."""
        always = tuple(before.dense_layers)
        policies = [Policy(label, replace(base, dense_layers=always + tuple(d))) for label, d in kept.items()]
        return _whole(ppl(subject, policies, batch_size=batch_size, **given(part)))

    extra = () if select == SparseConfig.select else (select,)
    chosen = subject._replace(config=base)
    mass = _whole(retrieval(chosen, top_k=[top_k], queries=queries, select=extra, **given("mass")))
    alone = measured("alone", {f"layer {i}": [j for j in layers if j != i] for i in layers})
    rows = _layer_rows(mass, alone, SELECT + select if extra else "index", layers)
    order = [r["layer"] for r in sorted(rows, key=lambda r: (-r["ratio"], r["layer"]))]
    curve = measured("curve", {f"{n} dense": sorted(order[:n]) for n in range(len(layers))})
    pairs = _curve_rows(curve, order)
    result = {
        "kind": "coverage",
        "config": config,
        "versions": versions(),
        "device": device(),
        "wall_s": round(perf_counter() - start, 1),
        "work_s": round(sum(part["work_s"] for part in (mass, alone, curve)), 1),
        "proposal": propose(pairs, within),
        "rows": rows,
        "pairs": pairs,
        "items": [],
    }
    if out and (world is None or world.rank == 0):
        write_result(out, result)
    return result


def _whole(result: Result | None) -> Result:
    assert result is not None  # only a Share has a part
    return result


def _layer_rows(mass: Result, alone: Result, method: str, layers: list[int]) -> list[Row]:
    masses = {(r["policy"], r["layer"]): r["mass_value"] for r in mass["rows"]}
    pairs = {p["policy"]: p for p in alone["pairs"] if p["against"] == "dense"}
    return [
        {
            "layer": i,
            "mass": masses[method, i],
            "mass_over": masses[method, i] / masses["attention", i],
            **{k: pairs[f"layer {i}"][k] for k in ("n", "ratio", "ratio_low", "ratio_high")},
        }
        for i in layers
    ]


def _curve_rows(curve: Result, order: list[int]) -> list[Row]:
    pairs = {p["policy"]: p for p in curve["pairs"] if p["against"] == "dense"}
    found = [
        {
            "n_dense": n,
            "dense_layers": sorted(order[:n]),
            **{k: pairs[f"{n} dense"][k] for k in ("ratio", "ratio_low", "ratio_high")},
        }
        for n in range(len(order))
    ]
    whole = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}  # the dense model itself
    return [*found, {"n_dense": len(order), "dense_layers": sorted(order), **whole}]


def propose(pairs: list[Row], within: float) -> list[int]:
    """Return the fewest dense layers of a curve that keep perplexity within some percent of dense.

    Args:
        pairs (list of dict): the curve, from none dense on to all.
        within (float): percent.
    """
    return next(p["dense_layers"] for p in pairs if 100 * (p["ratio"] - 1) <= within)


def coverage_tables(result: Result) -> tuple[Table, Table]:
    """Return the tables of layers and of the curve, each as a header and rows."""
    header = ["layer", "mass@K", "over the attention's own", "perplexity over dense, it alone sparse [95%]"]
    layers = [[str(r["layer"]), f"{100 * r['mass']:.1f}%", f"{r['mass_over']:.3f}", _ratio(r)] for r in result["rows"]]
    curve = [[str(p["n_dense"]), " ".join(map(str, p["dense_layers"])) or "-", _ratio(p)] for p in result["pairs"]]
    return (header, layers), (["dense layers", "which", "perplexity over dense [95%]"], curve)


def _ratio(row: Row) -> str:
    ends = [row[k] for k in ("ratio_low", "ratio_high")]
    return f"{row['ratio']:.4f}" + (" [one text]" if None in ends else " [{:.4f}, {:.4f}]".format(*ends))


def plot_coverage(result: Result, path: str | os.PathLike) -> None:
    """Draw mass and loss by layer, and the curve, as a PNG.

    Args:
        result (dict): of `coverage`.
        path (Path): where to.

    Raises:
        ValueError: if matplotlib is missing.
    """
    save_picture(lambda plt: _figure(result, plt), path)


def _figure(result: Result, plt: Any) -> Figure:
    rows, pairs = result["rows"], result["pairs"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    layers = [r["layer"] for r in rows]
    axes[0].bar(layers, [r["mass_over"] for r in rows], color="#1b6ca8")
    axes[0].set_ylim(0, 1.02)
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("mass@K over the attention's own")
    for axis, x, of in ((axes[1], layers, rows), (axes[2], [p["n_dense"] for p in pairs], pairs)):
        y = [r["ratio"] for r in of]
        ends = [
            [max(0.0, sign * (y_ - (r[key] if r[key] is not None else y_))) for r, y_ in zip(of, y)]
            for sign, key in ((1, "ratio_low"), (-1, "ratio_high"))
        ]
        line = "none" if of is rows else "-"
        axis.errorbar(x, y, yerr=ends, marker="o", markersize=4, capsize=3, color="#d1495b", linestyle=line)
        axis.axhline(1, color="#333333", linewidth=1, linestyle="--")
        axis.grid(alpha=0.25)
    axes[1].set_xlabel("layer that alone is sparse")
    axes[1].set_ylabel("perplexity over dense, bootstrap 95%")
    axes[2].set_xlabel("layers left dense, the costliest first")
    axes[2].axvline(len(result["proposal"]), color="#2e8b57", linewidth=1, linestyle=":")
    config = result["config"]
    figure.suptitle(f"Layers, {config['select']}, K = {config['top_k']:,} of {config['length']:,} tokens", fontsize=10)
    return figure
