"""Evaluators: dense and sparse on the very same items, compared in pairs."""

from .code import code
from .compare import compare
from .coverage import coverage
from .gsm8k import gsm8k
from .leaderboard import leaderboard
from .memory import memory
from .needle import needle
from .plots import plot
from .policies import Policy, make_policies, make_policy
from .ppl import ppl
from .results import read_result
from .retrieval import retrieval
from .runner import connect
from .suite import read_suite, run_suite
from .timing import timing

__all__ = [
    "Policy",
    "code",
    "compare",
    "connect",
    "coverage",
    "gsm8k",
    "leaderboard",
    "make_policies",
    "make_policy",
    "memory",
    "needle",
    "plot",
    "ppl",
    "read_result",
    "read_suite",
    "retrieval",
    "run_suite",
    "timing",
]
