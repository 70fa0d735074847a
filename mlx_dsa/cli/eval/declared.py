"""Command-line options from the fields of a dataclass (``mlx_dsa.tasks.options``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin, get_type_hints

import click

from ...tasks.options import Option, options_of
from ..options import add_options
from .options import Numbers


def declared_options(kind: type) -> Callable:
    """Return a decorator that adds the options of an evaluator's dataclass to a command."""
    said, hints = options_of(kind), get_type_hints(kind)
    shown = [f for f in fields(kind) if f.name in said and said[f.name].help]
    own = tuple(_option(f, said[f.name], hints[f.name]) for f in shown)
    return lambda command: add_options(command, own)


def chosen(kind: type, quick: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Return what an evaluator is given, with what ``--quick`` says of options that were not.

    Args:
        kind (type): The evaluator's dataclass.
        quick (bool): Whether ``--quick`` was given.
        given (dict): The options by name.
    """
    found = dict(given)
    for name, said in options_of(kind).items():
        if said.counted and found.get(name):
            found[name] = _spread(found[name])
        if found.get(name) is None:
            found[name] = said.quick if quick and said.quick is not None else _usual(kind, name, said)
    return found


def _usual(kind: type, name: str, said: Option) -> Any:
    return said.usual if said.usual is not None else next(f.default for f in fields(kind) if f.name == name)


def _spread(n: int) -> list[float]:
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.5]


def _option(field: Field, said: Option, hint: Any) -> Callable:
    flags = said.flags or (f"--{field.name.replace('_', '-')}",)
    if hint is bool:
        return click.option(*flags, field.name, is_flag=True, help=said.help)
    told: str | None = said.told
    default: Any = None if field.default is MISSING else field.default
    # `chosen` puts in what was not said: --quick may have a value of its own, and places are counted.
    later = said.quick is not None or said.counted
    if later and told is None:
        usual = default if said.usual is None else said.usual
        told = f"{len(usual)}" if said.counted else _text(usual)
    return click.option(
        *flags,
        field.name,
        type=_type(said, hint),
        metavar=said.metavar,
        default=None if later else default,
        show_default=told is None,
        required=field.default is MISSING and said.usual is None,
        help=said.help + (f"  [default: {told}]" if told else ""),
    )


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _type(said: Option, hint: Any) -> click.ParamType | None:
    if said.choices:
        return click.Choice(said.choices)
    if said.least is not None or said.counted:
        return click.IntRange(min=1 if said.least is None else said.least)
    if (get_origin(hint) or hint) in (list, tuple, Sequence):
        return Numbers(*get_args(hint)[:1])
    return click.types.convert_type(next((k for k in (*get_args(hint), hint) if k in (int, float)), str))
