"""mlx-dsa eval NAME, of an evaluator that another package registers."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter
from typing import Any, get_args, get_origin, get_type_hints

import click

from ...evals.evaluator import Evaluator, evaluator_kinds, evaluator_of, options_class
from ..command import Command
from .declared import chosen, declared_options
from .options import Numbers, eval_options, open_run
from .show import progress_bar, show

# Options that every evaluation has on the command line.
_SHARED = ("batch_size", "seed", "compare", "top_k")


class Evaluations(click.Group):
    """The group of evaluations, which asks for those of other packages when it has to."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all evaluations."""
        others = [kind for kind in evaluator_kinds() if kind not in self.commands]
        return [*super().list_commands(ctx), *others]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return an evaluation's command."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in evaluator_kinds():
            return own
        return command_of(evaluator_of(cmd_name))


def command_of(evaluator: Evaluator) -> click.Command:
    """Return a command with an option for each of an evaluator's.

    They are those of its dataclass, if it has one. Else their types are those of annotations, or
    of defaults: a list has commas between its numbers, and what is true or false is a flag.
    """
    declared = options_class(evaluator)
    own = {name: p for name, p in evaluator.options.items() if name not in _SHARED}
    shared = [name for name in _SHARED if name in evaluator.options]

    def run(**given: Any) -> None:
        quick = given.pop("quick")
        for name, default in (("batch_size", 1), ("compare", "dense"), ("seed", 0)):
            if name not in shared and given.pop(name) != default:
                raise click.UsageError(f"{evaluator.kind} has no --{name.removesuffix('_size')}: leave it out.")
        if declared:
            given = chosen(declared, quick, given)
        elif quick and "limit" in own and given["limit"] == own["limit"].default:
            given["limit"] = 1
        plot, top_k = given.pop("plot"), given.pop("top_k")
        policies = given if evaluator.takes_policies else {**given, "policies": ["dense"]}
        run = open_run(top_k=top_k if evaluator.takes_policies else None, **policies)
        subject = (run.subject, run.policies) if evaluator.takes_policies else (run.subject,)
        budgets = {"top_k": top_k} if top_k and not evaluator.takes_policies else {}
        with progress_bar(run.given["world"]) as progress:
            result = evaluator.run(*subject, progress=progress, **budgets, **run.given)
        show(result, world=run.given["world"], out=given["out"], plot=plot)

    text = (evaluator.run.__doc__ or "").strip().partition("\n\n")[0]
    add = eval_options(policies=evaluator.takes_policies)
    make = click.command(evaluator.kind, cls=Command, help=text)
    if declared:
        return make(declared_options(declared)(add(run)))
    command = make(add(run))
    hints = get_type_hints(evaluator.run)
    command.params[:0] = [_option(name, parameter, hints.get(name)) for name, parameter in own.items()]
    return command


def _option(name: str, parameter: Parameter, hint: Any) -> click.Option:
    given = parameter.default is not Parameter.empty
    default = parameter.default if given else None
    flag = f"--{name.replace('_', '-')}"
    kind = hint if hint is not None else type(default) if default is not None else str
    if kind is bool:
        return click.Option([flag], is_flag=True, default=bool(default))
    shared: dict[str, Any] = {"required": not given, "show_default": default is not None}
    if (get_origin(kind) or kind) in (list, tuple, Sequence):
        numbers = (get_args(kind) or (type(default[0]) if default else int,))[0]
        several = list(default or ()) or None
        return click.Option([flag], type=Numbers(numbers), metavar="N,...", default=several, **shared)
    scalar = next((k for k in (*get_args(kind), kind) if k in (int, float, str)), str)
    return click.Option([flag], type=scalar, default=default, **shared)
