"""The options that the evaluations share, and what they make of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import click

from ...config import CHOICES
from ...evals.policies import Policy, followed, lookup, make_policies, policy_names
from ...evals.running.runner import World, connect
from ...presets import Preset, load_settings
from ..options import (
    PREFILL_HELP,
    SEED,
    add_options,
    may_stream,
    model_options,
    plot_option,
    positions_option,
    settings_from,
    subject_name,
)
from ..outputs import OutputPath
from ..session import hint_at_blas


class Numbers(click.ParamType):
    """Whole numbers, or decimal ones, with commas between them."""

    name = "numbers"

    def __init__(self, kind: type = int):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Return a list."""
        if isinstance(value, list):
            return value
        try:
            numbers = [self.kind(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1024,2048.", param, ctx)
        if any(number < 1 for number in numbers):
            self.fail(f"{value!r} holds a number below 1.", param, ctx)
        return list(dict.fromkeys(numbers))


class Listing(click.Option):
    """An option whose help ends with names that are asked for when it is shown.

    Rules of other packages are loaded for that, not whenever a command starts.
    """

    def __init__(self, *args: Any, names: Callable[[], Iterable[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.names = names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, the names in place of ``{}``."""
        record = super().get_help_record(ctx)
        if record is None:  # it is hidden
            return None
        option, text = record
        return option, text.replace("{}", ", ".join(self.names()))


def split_rules(value: str) -> list[str]:
    """Return names with commas between them; a rule's options have commas between them, too."""
    names: list[str] = []
    for part in (part.strip() for part in value.split(",")):
        if names and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


class Names(click.ParamType):
    """Policies, with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Return a list."""
        if isinstance(value, list):
            return value
        names = list(dict.fromkeys(split_rules(value)))
        for name in names:
            try:
                lookup(name)
            except ValueError as error:
                self.fail(str(error).partition("] ")[2], param, ctx)
        return names


_SPARSE = (
    click.option(
        "--top-k",
        type=Numbers(),
        metavar="K,...",
        help="Keys that a query attends to; several make a sweep.",
    ),
    click.option(
        "--n-recent",
        type=click.IntRange(min=1),
        metavar="N",
        help="Newest keys, always among top-k.  [default: the preset's, at most half of top-k]",
    ),
    click.option(
        "--cache",
        type=click.Choice(CHOICES["cache"]),
        help="Keep top-k entries a layer, all, or all with the others in a cold store.",
    ),
    click.option(
        "--prefill",
        type=click.Choice(CHOICES["prefill"]),
        help=PREFILL_HELP,
    ),
    click.option(
        "--stream-chunk",
        type=click.IntRange(min=1),
        metavar="N",
        help="Where a policy reads by stream: tokens between two cuts.  [default: the preset's]",
    ),
    positions_option,
)
_RUN = (
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything random."),
    click.option(
        "--batch",
        "batch_size",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Equally long items at once.",
    ),
    click.option("--quick", is_flag=True, help="A few items, to see that it works."),
    click.option(
        "--out",
        metavar="FILE.json",
        type=OutputPath(),
        help="Write the results; resume if interrupted.",
    ),
    plot_option,
)
_POLICIES = (
    click.option(
        "--policies",
        type=Names(),
        default="dense,sparse",
        show_default=True,
        metavar="NAME,...",
        cls=Listing,
        names=policy_names,
        help="What to run: {}.",
    ),
    click.option(
        "--compare",
        default="dense",
        show_default=True,
        metavar="NAME,...",
        callback=lambda context, option, value: value.split(",") if "," in value else value,
        help="What the others are compared with, in pairs; or A/B: all A with the B of equal top-k.",
    ),
)


def eval_options(policies: bool = True) -> Callable:
    """Add the options of every evaluation."""

    def add(command: Callable) -> Callable:
        own = (*_SPARSE, *(_POLICIES if policies else ()), *_RUN)
        return model_options(add_options(command, own))

    return add


class Run(NamedTuple):
    """What an evaluation runs on.

    Args:
        subject (Preset): the model and what goes with it.
        policies (list of Policy): what to compare.
        given (dict): the arguments name, out, world of every evaluator, and its own.
    """

    subject: Preset
    policies: list[Policy]
    given: dict[str, Any]


def open_run(
    *,
    preset: str | None,
    model: str | None,
    indexer: str | None,
    config: str | None,
    top_k: list[int] | None,
    n_recent: int | None,
    cache: str | None,
    prefill: str | None,
    stream_chunk: int | None,
    positions: str | None,
    policies: list[str],
    out: str | None,
    **own: Any,
) -> Run:
    """Load what the options name.

    Args:
        own: The arguments of the evaluator alone.

    Returns:
        Run: The model, the policies and where the results go.
    """
    for option, value in (("cache", cache), ("prefill", prefill), ("positions", positions)):
        if value is not None and not any(followed(name, option) for name in policies):
            raise click.UsageError(f"--{option} has no effect on {', '.join(policies)}. Leave it out.")
    settings = settings_from(
        preset=preset,
        model=model,
        indexer=indexer,
        config=config,
        n_recent=n_recent,
        cache=cache,
        prefill=prefill,
        positions=positions,
    )
    start = settings.config
    if stream_chunk is not None:
        start = replace(start, stream_chunk=stream_chunk)
    recent = {} if n_recent is None else {"n_recent": n_recent}
    budgets = [{"top_k": k, **recent} for k in top_k or ()]
    chosen = make_policies(policies, start, budgets)
    if stream_chunk is not None and not any(p.config and may_stream(p.config, settings) for p in chosen):
        raise click.UsageError(
            f"--stream-chunk has no effect on {', '.join(policies)}. Leave it out, or use policy stream."
        )
    world = open_world()
    hint_at_blas()
    name = subject_name(settings, preset, model, config)
    return Run(load_settings(settings), chosen, {"name": name, "out": out, "world": world, **own})


def open_world() -> World:
    """Join the other processes, if mlx.launch started this one."""
    return connect() if "MLX_RANK" in os.environ else World()
