"""Rules by name: how keys are selected, and how entries are forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from .plugins import load_plugins

# What a rule is for -> its name -> its class.
_RULES: dict[str, dict[str, type]] = {"select": {}, "evict": {}}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_TRUTH = {"true": True, "false": False}


def register(kind: str, name: str) -> Callable[[type], type]:
    """Return a decorator that makes a rule known by a name.

    Args:
        kind (str): ``"select"`` or ``"evict"``.
        name (str): What settings and the command line call it.

    Raises:
        ValueError: If another rule has the name.
    """

    def known(rule: type) -> type:
        there = _RULES[kind].setdefault(name, rule)
        if there is not rule:
            raise ValueError(f"[register] {kind!r} has a rule {name!r} already: {there}.")
        return rule

    return known


def forget(kind: str, name: str):
    """Take a rule out of the registry again."""
    del _RULES[kind][name]


def rule_names(kind: str) -> tuple[str, ...]:
    """Return the names of the rules of a kind, ``"select"`` or ``"evict"``."""
    load_plugins("rules")
    return tuple(_RULES[kind])


def rule_class(kind: str, text: str) -> type[Any]:
    """Return the class of the rule that a setting names: see :func:`make_rule`."""
    name = text.partition(":")[0] if isinstance(text, str) else text
    known = isinstance(name, str) and (name in _RULES[kind] or name in rule_names(kind))
    if not known:
        raise ValueError(f"[SparseConfig] '{kind}' must be one of {', '.join(_RULES[kind])} but got {name!r}.")
    return _RULES[kind][name]


def make_rule(kind: str, text: str) -> Any:
    """Make the rule that a setting names.

    Args:
        kind (str): ``"select"`` or ``"evict"``.
        text (str): The rule's name, and behind a colon options, as ``snapkv:observes=16``;
          several with commas between them.

    Returns:
        Any: The rule, not bound to a layer.

    Raises:
        ValueError: If the rule, or an option, is unknown or not valid.
    """
    cls = rule_class(kind, text)
    name, colon, rest = text.partition(":")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    given = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if key not in known:
            have = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"[SparseConfig] '{kind}' {name!r} has no option {key!r}: {have}. Write options as {name}:key=value."
            )
        where = f"[SparseConfig] '{kind}' {name!r}"
        if not equals:
            raise ValueError(f"{where}: write {key}=value.")
        given[key] = _value(f"{where}: option {key!r}", hints[key], value)
    return cls(**given)


def _value(where: str, hint: Any, text: str) -> Any:
    kind = next((t for t in (*get_args(hint), hint) if t in _WORDS), str)
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where} must be {_WORDS[kind]} but got {text!r}.") from None
