"""What an evaluator is, and which there are.

An evaluator is a file that registers one: the suite, ``mlx-dsa eval``, comparisons, tables and
pictures know it from then on. Installed packages may name modules that do in the entry points
``mlx_dsa.evaluators``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any, get_type_hints

from ..plugins import load_plugins

Result = dict[str, Any]
Row = dict[str, Any]  # of a result: a row, a pair or an item
Table = tuple[list[str], list[list[str]]]
Progress = Callable[[int, int, str], None]  # units done, units in all, what is at hand

# What every evaluator is given, and no option of its own.
_GIVEN = ("subject", "policies", "name", "out", "world", "progress", "running")
_EVALUATORS: dict[str, Evaluator] = {}


@dataclass(frozen=True)
class Evaluator:
    """One way to measure, and how what it finds is shown.

    Args:
        kind (str): Its name in suites, results and on the command line.
        run (callable): Takes a subject, policies and its options; returns a result, as
          :func:`running.runner.evaluate` makes it. It is given ``name``, what the model was
          loaded as, and ``out``, ``world`` and ``progress`` of that function.
        table (callable): From a result to the header and the rows of its table, all strings.
        plot (callable): From a result and matplotlib's ``pyplot`` to a figure.
        pairs (callable, optional): From a result's pairs to a table. Default: ``None``.
        note (callable, optional): From a result to what must be read with its table, or
          ``None``. Default: ``None``.
        metrics (tuple of str): Fields of its items, true or false, by which two results are
          compared. Default: ``()``.
        difference (callable, optional): From the items of two results to a comparison of
          another form. Default: ``None``.
        cell (callable, optional): From a result and a policy's label to its cell in a table
          of several runs. Default: ``None``.
        asks (bool): Whether it asks questions, so that right answers can be drawn by
          retention. Default: ``False``.
        takes_policies (bool): Whether it compares policies. Default: ``True``.
    """

    kind: str
    run: Callable[..., Result | None]
    table: Callable[[Result], Table]
    plot: Callable[[Result, Any], Any]
    pairs: Callable[[list[Row]], Table] | None = None
    note: Callable[[Result], str | None] | None = None
    metrics: tuple[str, ...] = ()
    difference: Callable[[dict[str, Row], dict[str, Row]], Row] | None = None
    cell: Callable[[Result, Any], str] | None = None
    asks: bool = False
    takes_policies: bool = True

    @property
    def options(self) -> dict[str, Parameter]:
        """Its own options, by name."""
        there = signature(self.run).parameters.items()
        return {name: parameter for name, parameter in there if name not in _GIVEN}


def takes(kind: type) -> Callable[[Callable[..., Result | None]], Callable[..., Result | None]]:
    """Return a decorator of evaluators whose options are the fields of a dataclass.

    The function has a parameter ``options``; what it becomes has a keyword argument for each field
    in its place.

    Args:
        kind (type): The dataclass.
    """

    def taking(function: Callable[..., Result | None]) -> Callable[..., Result | None]:
        hints = get_type_hints(kind)
        own = {
            f.name: Parameter(
                f.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if f.default is MISSING else f.default,
                annotation=hints[f.name],
            )
            for f in fields(kind)
        }
        there = signature(function)
        others = [p for name, p in there.parameters.items() if name != "options"]
        first = [p for p in others if p.kind is not Parameter.KEYWORD_ONLY]
        taken = there.replace(parameters=[*first, *own.values(), *others[len(first) :]])

        @wraps(function)
        def run(*args: Any, **given: Any) -> Result | None:
            known = taken.bind(*args, **given).arguments
            options = kind(**{name: known.pop(name) for name in own if name in known})
            return function(**known, options=options)

        vars(run).update(__signature__=taken, options_class=kind)
        return run

    return taking


def options_class(evaluator: Evaluator) -> type | None:
    """Return the dataclass whose fields are an evaluator's options, if it has one: see :func:`takes`."""
    return getattr(evaluator.run, "options_class", None)


def register(evaluator: Evaluator) -> Evaluator:
    """Make an evaluator known by its kind.

    Raises:
        ValueError: If another one is.
    """
    there = _EVALUATORS.setdefault(evaluator.kind, evaluator)
    if there is not evaluator:
        raise ValueError(f"[register] there is an evaluator {evaluator.kind!r} already.")
    return evaluator


def forget(kind: str) -> None:
    """Take an evaluator out of the registry again."""
    del _EVALUATORS[kind]


def evaluator_kinds() -> tuple[str, ...]:
    """Return the kinds of all evaluators."""
    load_plugins("evaluators")
    return tuple(_EVALUATORS)


def evaluator_of(kind: str) -> Evaluator:
    """Return the evaluator of a kind.

    Raises:
        ValueError: If there is none.
    """
    if kind not in _EVALUATORS and kind not in evaluator_kinds():
        raise ValueError(f"[evals] 'kind' must be one of {', '.join(_EVALUATORS)} but got {kind!r}.")
    return _EVALUATORS[kind]
