"""What all commands share: no option counts twice, and errors speak of options."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import click

from ..config import SparseConfig


class Command(click.Command):
    """A command that refuses a repeated option and names options in its errors."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; an option of one value may be there once."""
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        seen = set()
        for param in order:
            if param in seen and takes_one_value(param):
                raise click.UsageError(f"{option_of(param)} is there twice. Give it once.", ctx)
            seen.add(param)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise ValueError(in_options(str(error), self)) from error


def takes_one_value(param: click.Parameter) -> bool:
    """Whether a second value would take the place of the first."""
    return isinstance(param, click.Option) and not (param.multiple or param.is_flag or param.count)


def option_of(param: click.Parameter) -> str:
    """Return an option as the user types it."""
    return next((name for name in param.opts if name.startswith("--")), param.opts[0])


def in_options(text: str, command: click.Command) -> str:
    """Say a message of the package in the words of the command line.

    Args:
        text (str): It names fields, such as ``'top_k'``.
        command (click.Command): Whose options stand for them. A field that has none
          is a key of its ``--config`` file.

    Returns:
        str: The message with options in place of fields.
    """
    text = re.sub(r"^\[[\w-]+\] ", "", text)
    if "unknown key" in text:  # it lists the keys of a file
        return text
    options = {p.name: option_of(p) for p in command.params if isinstance(p, click.Option)}
    keys = [f.name for f in fields(SparseConfig) if f.name not in options]
    keys = [f for f in keys if re.search(_field(f), text)]
    for name, option in options.items():
        text = re.sub(rf"\b{name}='([^']*)'", rf"{option} \1", text)
        text = re.sub(_field(name), option, text)
    if keys and {"config", "top_k"} <= set(options):
        text = f"{text} Set {', '.join(keys)} in a --config file."
    return text


def _field(name: str) -> str:
    """Return a pattern for a field: in quotes, or bare where it is no word of English."""
    bare = rf"|(?<![\w./'-]){name}(?![\w/'=]|\.\w)" if "_" in name else ""
    return rf"'{name}'{bare}"
