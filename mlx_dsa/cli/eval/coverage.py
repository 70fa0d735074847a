"""mlx-dsa eval coverage: which layers bear being sparse?"""

from __future__ import annotations

from typing import Any

import click

from ...evals.layer_coverage import coverage as run_coverage
from ...evals.layer_coverage import coverage_tables, plot_coverage
from ...presets import load_settings
from ..command import Command
from ..options import SEED, FiniteRange, RuleName, model_options, plot_option, settings_from, subject_name
from ..outputs import OutputPath
from ..session import hint_at_blas
from .options import open_world
from .show import print_table, progress_bar


@click.command(cls=Command)
@click.option("--top-k", type=click.IntRange(min=1), default=256, show_default=True, help="Keys a query.")
@click.option("--select", type=RuleName("select"), default="lightning", show_default=True, help="What selects them.")
@click.option("--lengths", "length", type=click.IntRange(min=2), metavar="N", help="Tokens of a text.  [default: 2048]")
@click.option("--limit", type=click.IntRange(min=1), help="Texts.  [default: 4]")
@click.option("--queries", type=click.IntRange(min=1), default=64, show_default=True, help="Positions a text for mass.")
@click.option(
    "--within",
    type=FiniteRange(min=0),
    default=1.0,
    show_default=True,
    metavar="PERCENT",
    help="Perplexity above dense that is borne: the fewest dense layers for it are proposed.",
)
@click.option("--data", metavar="FILE|NAME", help="The texts.  [default: bundled books]")
@click.option("--batch", "batch_size", type=click.IntRange(min=1), default=1, show_default=True, help="Texts at once.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--quick", is_flag=True, help="Few short texts, to see that it works.")
@click.option("--out", metavar="FILE.json", type=OutputPath(), help="Write the results; resume if interrupted.")
@plot_option
@model_options
def coverage(
    length: int | None,
    limit: int | None,
    quick: bool,
    out: str | None,
    plot: str | None,
    preset: str | None,
    model: str | None,
    indexer: str | None,
    config: str | None,
    **given: Any,
) -> None:
    """Each layer's mass@K, and perplexity by which layers are left dense.

    A layer's loss is that of the model in which it alone is sparse; those that cost most are left
    dense first. What it proposes is a value for dense_layers.
    """
    named: dict[str, Any] = {"preset": preset, "model": model, "indexer": indexer, "config": config}
    settings = settings_from(**named, select=given["select"], cache="full")
    world = open_world()
    hint_at_blas()
    subject = load_settings(settings)
    with progress_bar(world) as progress:
        result = run_coverage(
            subject,
            length=length or (512 if quick else 2048),
            limit=limit or (1 if quick else 4),
            name=subject_name(settings, preset, model, config),
            out=out,
            world=world,
            progress=progress,
            **given,
        )
    if world.rank:
        return
    for table in coverage_tables(result):
        print_table(*table)
        click.echo()
    click.echo(f'"dense_layers": {result["proposal"]}  (perplexity at most {given["within"]:g}% above dense)')
    if plot:
        plot_coverage(result, plot)
    for path in (out, plot):
        if path:
            click.echo(f"Wrote {path}")
