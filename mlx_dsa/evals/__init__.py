"""Evaluators: dense and sparse on the very same items, compared in pairs."""

# Evaluators are listed in this order.
# isort: off
from .needles import needle
from .code_recall import code
from .perplexity import ppl
from .key_retrieval import retrieval
from .word_problems import gsm8k
from .cache_memory import memory
from .timings import timing

# isort: on
from .layer_coverage import coverage
from .leaders import leaderboard
from .policies import Policy, make_policies, make_policy
from .report.compare import compare
from .report.plots import plot
from .running.results import read_result
from .running.runner import connect
from .suite import read_suite, run_suite

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
