"""Rules of selecting keys and of forgetting entries, one file a system or kin of systems."""

from ..registry import make_rule, register, rule_names
from . import (  # noqa: F401
    anchor,
    baselines,
    dhsa,
    double_sparsity,
    expected,
    h2o,
    hip,
    hnsw,
    keydiff,
    lagkv,
    lightning,
    merging,
    minference,
    mixture,
    power,
    projections,
    quest,
    retention,
    reuse,
    s2o,
    snapkv,
    sparsek,
    top_p,
)
from .evict_rule import EvictRule
from .kvzip import KVzip
from .rule import Probe, fold_heads
from .select_rule import SelectRule, kind_of
from .sparsek import sparsek_settings

__all__ = [
    "EvictRule", "KVzip", "Probe", "SelectRule", "fold_heads", "kind_of", "make_rule", "register",
    "rule_names", "sparsek_settings",
]  # fmt: skip
