"""mlx-dsa convert: trained search projections of other systems in the form that is read here."""

from __future__ import annotations

from pathlib import Path

import click

from ..checkpoint_file import RUN_CONFIG, file_of
from ..convert import read_projections
from ..search import save_projections
from .command import Command
from .outputs import check_output


@click.command(cls=Command)
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT")
@click.option(
    "--transposed/--not-transposed",
    default=None,
    help="How SOURCE stores its matrices, where that is asked for.",
)
@click.option("--force", is_flag=True, help="Replace the files in OUT if they exist.")
def convert(source: str, out: str, transposed: bool | None, force: bool) -> None:
    """Convert trained search projections, for --select projections.

    SOURCE is a PyTorch checkpoint (.pt, .pth or .bin, in zip format) or a GGUF file. Nothing
    in it is executed. OUT is a folder, or a .safetensors file; a run_config.json is written
    beside it.
    """
    file = file_of(Path(out))
    for path in (file, file.with_name(RUN_CONFIG)):
        check_output(path)
        if path.exists() and not force:
            raise click.UsageError(f"{path} exists. Name another place, or give --force.")
    projections = read_projections(source, transposed)
    save_projections(file, projections, {"source": Path(source).name})
    args = next(iter(projections.values())).args
    click.echo(
        f"{file}: projections of {len(projections)} layers "
        f"({', '.join(map(str, projections))}), {args.dim} to {args.index_head_dim}. Use them "
        f"with --indexer {out} --select projections."
    )
