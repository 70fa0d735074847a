"""The options that commands share: command line over file over preset."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from ..config import CHOICES, COLD_BITS, SparseConfig, override
from ..presets import Settings, heads_of, preset_names, read_settings, resolve
from ..rules import make_rule, rule_names
from ..saved import SavedSettings, kept_by, read_saved
from .outputs import OutputPath

SEED = click.IntRange(0, 2**32 - 1)
_LEAST_TEMP = 1e-3  # log-probabilities over less than that leave the range of float16


class FiniteRange(click.FloatRange):
    """A range of numbers without inf and nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class RuleName(click.ParamType):
    """A rule of a kind, and options of it behind a colon: ``snapkv:pool=2``."""

    name = "rule"

    def __init__(self, kind: str):
        self.kind = kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """List the rules that there are."""
        return f"[{'|'.join(rule_names(self.kind))}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text of a rule that can be made."""
        try:
            make_rule(self.kind, value)
        except ValueError as error:
            self.fail(str(error).removeprefix("[SparseConfig] "), param, ctx)
        return value


def _temperature(context: click.Context, option: click.Parameter, value: float) -> float:
    if 0 < value < _LEAST_TEMP:
        raise click.BadParameter(f"{value!r} is too small: use 0, or {_LEAST_TEMP} or more.")
    return value


_OF_THE_MACHINE = ("backend", "cold_bits", "cold_file")  # a saved cache goes to any
_MODEL = (
    click.option(
        "--preset",
        type=click.Choice(preset_names()),
        help="Settings to start from. Default: tiny, unless a model is named.",
    ),
    click.option("--model", metavar="PATH|REPO", help="The model."),
    click.option("--indexer", metavar="PATH|REPO", help="The model's indexers."),
    click.option(
        "--config",
        metavar="FILE",
        help="A JSON file of settings, with the keys of a preset.",
    ),
)
positions_option = click.option(
    "--positions",
    type=click.Choice(CHOICES["positions"]),
    help="With --cache budget: what is kept stays where it stood in the text; or it is "
    "numbered anew whenever something is dropped.",
)
PREFILL_HELP = (
    "How the prompt is read; stream drops what does not fit top-k on the way (with --cache "
    "tiered it goes cold). auto: stream with --positions compact where indexers have retention "
    "heads, else tile where it is fast."
)
_SPARSE = (
    click.option("--top-k", type=int, help="Keys that a query attends to."),
    click.option(
        "--n-recent",
        type=int,
        help="Newest keys, always among top-k.  [default: the preset's, at most half of top-k]",
    ),
    click.option(
        "--cache",
        type=click.Choice(CHOICES["cache"]),
        help="Keep top-k entries a layer; or all, and gather top-k of them; or top-k at hand and the others cold.",
    ),
    click.option(
        "--cold",
        "cold_file",
        metavar="FILE",
        help="With --cache tiered: a new file for the cold entries, deleted at the end.",
    ),
    click.option(
        "--cold-bits",
        type=click.Choice([str(bits) for bits in COLD_BITS]),
        callback=lambda context, option, value: value and int(value),
        help="With --cache tiered: bits of a cold number in memory; 16 as it is. Default: 8.",
    ),
    click.option(
        "--prefill",
        type=click.Choice(CHOICES["prefill"]),
        help=PREFILL_HELP,
    ),
    click.option(
        "--stream-chunk",
        type=int,
        metavar="N",
        help="Where a prompt is read by stream: tokens of the text between two cuts. Default: 2048.",
    ),
    positions_option,
    click.option(
        "--select",
        type=RuleName("select"),
        help="The rule by which keys are selected.  [default: lightning]",
    ),
    click.option(
        "--evict",
        type=RuleName("evict"),
        help="With --cache budget: the rule that orders entries for eviction.  [default: retention]",
    ),
)
_OF_SPARSE = ("indexer", "top_k", "n_recent", "cache", "cold_file", "cold_bits")
_OF_SPARSE += ("prefill", "stream_chunk", "positions", "select", "evict")
dense_option = click.option("--dense", is_flag=True, help="Use no indexers: the model as it is.")
think_option = click.option(
    "--think/--no-think",
    default=None,
    help="Let the model think before it answers, or not, where its chat template knows "
    "enable_thinking. Default: as mlx-lm does.",
)
plot_option = click.option("--plot", metavar="FILE.png", type=OutputPath(), help="Draw the results.")


def max_tokens_option(default: int) -> Callable:
    """Return the option that bounds an answer."""
    return click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="Tokens an answer may have.",
    )


_GENERATION = (
    max_tokens_option(512),
    click.option(
        "--temp",
        type=FiniteRange(min=0),
        default=0.0,
        show_default=True,
        callback=_temperature,
        help="Sampling temperature; 0 takes the most likely token.",
    ),
    click.option("--seed", type=SEED, help="Seed of the sampling. Default: 0."),
)


def add_options(command: Callable, options: tuple[Callable, ...]) -> Callable:
    """Add options to a command, in this order before those that it has."""
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Callable) -> Callable:
    """Add the options that name a model and its indexers."""
    return add_options(command, _MODEL)


def sparse_options(command: Callable) -> Callable:
    """Add the options of sparse attention."""
    return add_options(command, _SPARSE)


def generation_options(command: Callable) -> Callable:
    """Add the options of generation."""
    return add_options(command, _GENERATION)


def settings_from(
    *,
    preset: str | None = None,
    config: str | None = None,
    saved: SavedSettings | None = None,
    dense: bool = False,
    **given: Any,
) -> Settings:
    """Merge a preset, a file, the command line and the settings of a saved cache.

    Args:
        preset (str, optional): ``--preset``. Default: ``None``.
        config (str, optional): ``--config``. Default: ``None``.
        saved (SavedSettings, optional): Of :func:`open_saved`. Default: ``None``.
        dense (bool): ``--dense``. Default: ``False``.
        given: The other options by name, ``None`` where not given.

    Returns:
        Settings: What to load and how to run it.

    Raises:
        click.UsageError: If an option would have no effect.
        ValueError: If a value is not valid, or contradicts the saved cache.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if dense:
        for name in _OF_SPARSE:
            if name in given:
                option = name.removesuffix("_file").replace("_", "-")
                raise click.UsageError(f"--{option} has no effect with --dense. Leave one of them out.")
    values = override(read_settings(config) if config else {}, given)
    if saved is not None:
        preset, values = _with_saved(saved, preset, values)
    # A model of one's own takes nothing from the bundled one's settings.
    if preset is None and "model" not in values:
        preset = "tiny"
    settings = resolve(preset, **values)
    if "stream_chunk" in given and not may_stream(settings.config, settings):
        raise click.UsageError("--stream-chunk has no effect without --prefill stream. Leave it out.")
    return settings


def may_stream(config: SparseConfig, settings: Settings) -> bool:
    """Return whether a prompt is read by stream, as far as can be told without fetching.

    Args:
        config (SparseConfig): How it is read.
        settings (Settings): What is loaded.
    """
    if config.auto_may_stream:
        return heads_of(settings, download=False) is not False
    return config.prefill == "stream"


def open_saved(cache_file: str | None, dense: bool) -> SavedSettings | None:
    """Read what the file of ``--cache-file`` was made with; ``None`` without one.

    Raises:
        click.UsageError: If ``--dense`` stands beside it.
        ValueError: If it can't be read.
    """
    if cache_file is None:
        return None
    if dense:
        raise click.UsageError("--dense has no effect with --cache-file. Leave one of them out.")
    return read_saved(cache_file)


def _with_saved(saved: SavedSettings, preset: str | None, values: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Fill settings up with those that a saved cache was made with."""
    made, about = saved.config, saved.metadata
    if values.get("prefill") == "auto" and _auto_streamed(made):
        values = {name: value for name, value in values.items() if name != "prefill"}
    for name in kept_by(made, values):
        if name in values and values[name] != made.get(name):
            raise ValueError(
                f"{name!r} {values[name]} contradicts {saved.path}, which was made with {made.get(name)}. Leave it out."
            )
    if preset is None and "model" not in values:
        preset = about.get("preset")
        names: dict[str, Any] = {key: about[key] for key in ("model", "indexer") if key in about}
        values = {**names, **values}
    how = {key: value for key, value in made.items() if key not in _OF_THE_MACHINE}
    return preset, {**how, **values}


def _auto_streamed(made: dict[str, Any]) -> bool:
    """Return whether ``"auto"`` may have made a cache that was streamed."""
    how = SparseConfig.from_dict({**made, "prefill": "auto"})
    return made["prefill"] == "stream" and how.auto_may_stream


def subject_name(settings: Settings, preset: str | None, model: str | None, config: str | None) -> str:
    """Return what a result calls its model, as the user named it, not where it was found."""
    if model or config:
        return model or settings.model
    return f"preset {preset or 'tiny'}"


def check_seed(seed: int | None, temp: float) -> int:
    """Return the seed to use; refuse one that would have no effect."""
    if seed is not None and temp == 0:
        raise click.UsageError("--seed has no effect at --temp 0.")
    return seed or 0


def describe_config(config: SparseConfig) -> str:
    """Return a config's main fields as one line."""
    every = f" (a cut every {config.stream_chunk})" if config.prefill == "stream" else ""
    anew = ", positions compact" if config.positions == "compact" else ""
    rules = "".join(
        f", {kind} {getattr(config, kind)}"
        for kind in ("select", "evict")
        if getattr(config, kind) != getattr(SparseConfig, kind)
    )
    return (
        f"top_k {config.top_k}, cache {config.cache}, prefill {config.prefill}{every}{anew}, "
        f"{config.n_sink} sinks, {config.n_recent} recent{rules}"
    )
