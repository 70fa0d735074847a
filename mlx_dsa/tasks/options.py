"""An option of what is asked, or of an evaluator: said once, as a field of a dataclass.

Functions' arguments, suites and the command line follow from the fields.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """What the command line says of a field.

    Args:
        help (str): What it is.
        choices (tuple of str): All that it may be. Default: ``()``, anything.
        least (int, optional): The least that it may be. Default: ``None``.
        usual (Any): What it is on the command line, where functions and suites must say it.
        quick (Any): What it is with ``--quick``. Default: ``None``, as without.
        told (str, optional): The default in words; ``""`` to tell none. Default: ``None``, as it is.
        metavar (str, optional): What stands for its value. Default: ``None``, by its type.
        flags (tuple of str): How it is called. Default: ``()``, as the field.
        counted (bool): Whether a number of places, spread evenly from 0 to 1, stands for them.
          Default: ``False``.
    """

    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    usual: Any = None
    quick: Any = None
    told: str | None = None
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    counted: bool = False


def option(default: Any = MISSING, help: str = "", **said: Any) -> Any:
    """Return a field that is an option: see :class:`Option`.

    Args:
        default (Any): Its value where nothing is said. Default: none, it must be said.
        help (str): What it is. Default: ``""``, the command line does not have it.
    """
    return field(default=default, metadata={"option": Option(help=help, **said)})


def answer_tokens(default: int) -> Any:
    """Return the field that bounds an answer."""
    return option(default, "Tokens an answer may have.", least=1)


def options_of(kind: Any) -> dict[str, Option]:
    """Return the options among a dataclass's fields, by name."""
    return {f.name: f.metadata["option"] for f in fields(kind) if "option" in f.metadata}


def check_choices(where: str, options: Any, *names: str) -> None:
    """Refuse what is none of an option's choices.

    Args:
        where (str): What the message begins with.
        options (Any): A dataclass with options.
        names (str): Those to look at.
    """
    for name in names:
        choices, value = options_of(options)[name].choices, getattr(options, name)
        if value not in choices:
            raise ValueError(f"[{where}] '{name}' must be one of {', '.join(choices)} but got {value!r}.")


def part_of(options: Any, kind: type[T]) -> T:
    """Return the fields of a dataclass that one of its bases has, as that base."""
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind)})  # type: ignore[arg-type]  # a dataclass
