"""Rules of selecting keys and of forgetting entries, one file a system or kin of systems."""

from ..registry import make_rule, register, rule_names
from . import baselines, keydiff, lightning, projections, retention, snapkv  # noqa: F401
from .rule import EvictRule, Probe, SelectRule

__all__ = ["EvictRule", "Probe", "SelectRule", "make_rule", "register", "rule_names"]
