"""Rules of selecting keys and of forgetting entries, one file a system or kin of systems."""

from ..registry import make_rule, register, rule_names
from . import baselines, expected, h2o, keydiff, lagkv, lightning, merging  # noqa: F401
from . import retention, snapkv  # noqa: F401
from .kvzip import KVzip
from .rule import EvictRule, Probe, SelectRule

__all__ = ["EvictRule", "KVzip", "Probe", "SelectRule", "make_rule", "register", "rule_names"]
