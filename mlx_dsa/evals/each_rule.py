"""Policies that stand for every rule there is: "evict:*" and "select:*"."""

from __future__ import annotations

from typing import Any

from ..rules import EvictRule, make_rule, rule_names

Spec = str | dict[str, Any]  # of a policy
SELECT = "select:"  # and the name of a rule of selecting: a policy that evicts nothing
EVERY = {"evict:*": "evict", "select:*": "select"}


def rules_alone(kind: str) -> tuple[str, ...]:
    """Return the names of the rules of a kind that need no options."""

    def is_made(name: str) -> bool:
        try:
            return bool(make_rule(kind, name))
        except TypeError:  # an option that has no default
            return False

    return tuple(name for name in rule_names(kind) if is_made(name))


def each_rule(spec: Spec) -> list[Spec]:
    """Return one spec for each rule where a spec's policy stands for every one, else the spec alone.

    A rule of forgetting gets select "window", which keeps nothing beside keys and values, unless it
    reads what selects, or the spec says otherwise.

    Args:
        spec (str or dict): as for `make_policy`, or with policy "evict:*" or "select:*"; a dict may
            have "rules", the names of those that are meant, and no "label" then.
    """
    fields = {"policy": spec} if isinstance(spec, str) else dict(spec)
    kind = EVERY.get(fields.get("policy", "sparse"))
    if kind is None:
        return [spec]
    if "label" in fields:
        raise ValueError(f"[make_policies] policy {fields['policy']!r} is several: leave label out.")
    del fields["policy"]
    names = fields.pop("rules", None) or rules_alone(kind)
    if kind == "select":
        return [{"policy": SELECT + name, **fields} for name in names]
    return [{"policy": name, **_selecting_nothing(name), **fields} for name in names]


def _selecting_nothing(name: str) -> dict[str, str]:
    if name in ("window", "random"):  # these policies name what selects
        return {}
    rule = make_rule("evict", name)
    reads = rule.observes and type(rule).observed is EvictRule.observed
    return {} if reads else {"select": "window"}
