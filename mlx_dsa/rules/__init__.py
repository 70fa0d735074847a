"""Rules of selecting keys and of forgetting entries, one file a system or kin of systems."""

from ..registry import make_rule, register, rule_names
from . import baselines, keydiff, lightning, retention, snapkv  # noqa: F401
from .rule import EvictRule, Probe, SelectRule, fold_heads

__all__ = ["EvictRule", "Probe", "SelectRule", "fold_heads", "make_rule", "register", "rule_names"]
