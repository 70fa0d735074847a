"""Evaluators: dense and sparse on the very same items, compared in pairs."""

from .code_recall import code
from .report.compare import compare
from .layer_coverage import coverage
from .word_problems import gsm8k
from .leaders import leaderboard
from .cache_memory import memory
from .needles import needle
from .report.plots import plot
from .policies import Policy, make_policies, make_policy
from .perplexity import ppl
from .running.results import read_result
from .key_retrieval import retrieval
from .running.runner import connect
from .suite import read_suite, run_suite
from .timings import timing

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
