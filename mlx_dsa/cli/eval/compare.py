"""mlx-dsa eval compare: two result files, in pairs."""

from __future__ import annotations

import click

from ...evals.report.compare import compare as compare_results
from ...evals.running.results import read_result
from ..command import Command
from .show import print_table


@click.command(cls=Command)
@click.argument("first", metavar="A.json")
@click.argument("second", metavar="B.json")
def compare(first: str, second: str) -> None:
    """Compare two results of the same items, A minus B."""
    pairs = compare_results(read_result(first), read_result(second))
    header = ["policy of A", "policy of B", "metric", "n", "A - B", "interval or p"]
    rows = []
    for pair in pairs:
        if "p" in pair:
            difference, sure = f"{100 * pair['difference']:+.1f} points", f"p = {pair['p']:.3g}"
        else:
            difference = f"{pair['difference']:+.4f}"
            known = pair["low"] is not None
            sure = f"[{pair['low']:+.4f}, {pair['high']:+.4f}]" if known else "one text"
        rows.append([pair["policy"], pair["against"], pair["metric"], f"{pair['n']:,}", difference, sure])
    print_table(header, rows)
