"""Evaluators: dense and sparse on the very same items, compared in pairs."""

from .cache_memory import memory
from .code_recall import code
from .key_retrieval import retrieval
from .layer_coverage import coverage
from .leaders import leaderboard
from .needles import needle
from .perplexity import ppl
from .policies import Policy, make_policies, make_policy
from .report.compare import compare
from .report.plots import plot
from .running.results import read_result
from .running.runner import connect
from .suite import read_suite, run_suite
from .timings import timing
from .word_problems import gsm8k

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
