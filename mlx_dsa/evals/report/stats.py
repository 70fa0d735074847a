"""The statistics that every evaluator shares: intervals, and comparisons in pairs.

[1] Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
[2] McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions, 1947.
[3] Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion [1].

    Args:
        successes (int): how many of the `n` succeeded.
        n (int): the number of trials; 0 gives (0, 1), which says nothing.
        confidence (float): the coverage wanted. Default: ``0.95``.

    Returns:
        (float, float): the lower and the upper end.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"[wilson] 'successes' must be between 0 and n = {n} but got {successes}.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding would leave 1e-17 beyond it.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value that two paired proportions are equal [2].

    Args:
        only_first (int): the pairs in which only the first succeeded.
        only_second (int): the pairs in which only the second succeeded.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def smallest_difference(n: int, discordant: int = 0, alpha: float = 0.05) -> float | None:
    """Return the smallest difference of two paired proportions that would be significant.

    Given how many pairs disagreed, this is the least imbalance among them, over `n`, whose exact
    McNemar p-value is below `alpha`. Fewer disagreements than any test could use count as the
    least number that it could: 6 at 0.05.

    Args:
        n (int): the number of pairs.
        discordant (int): the pairs in which exactly one of the two succeeded. Default: ``0``.
        alpha (float): the level of the test. Default: ``0.05``.

    Returns:
        float: the difference, or ``None`` where not even `n` disagreeing pairs would do.
    """
    while mcnemar(discordant, 0) >= alpha:
        discordant += 1
    if discordant > n:
        return None
    fewer = discordant // 2
    while mcnemar(discordant - fewer, fewer) >= alpha:
        fewer -= 1
    return (discordant - 2 * fewer) / n


def paired_proportions(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Compare two lists of outcomes of the same items.

    Args:
        first, second (list of bool): the outcomes, item by item.

    Returns:
        dict: n, both, only_first, only_second, neither, difference (first - second), p,
        smallest_difference, and how often the first succeeds where the second does: retained, with
        its Wilson interval retained_low and retained_high (``None`` where the second never does).
    """
    if len(first) != len(second):
        raise ValueError(
            f"[paired_proportions] the lists must be of one length but got {len(first)} and {len(second)}."
        )
    pairs = list(zip(map(bool, first), map(bool, second)))
    counts = {pair: pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))}
    b, c, n = counts[True, False], counts[False, True], len(pairs)
    return {
        "n": n,
        "both": counts[True, True],
        "only_first": b,
        "only_second": c,
        "neither": counts[False, False],
        "difference": (b - c) / n if n else 0.0,
        "p": mcnemar(b, c),
        "smallest_difference": smallest_difference(n, b + c) if n else None,
        **_retained(counts[True, True], c),
    }


def _retained(both: int, only_second: int) -> dict[str, float | None]:
    n = both + only_second
    low, high = wilson(both, n) if n else (None, None)
    return {"retained": both / n if n else None, "retained_low": low, "retained_high": high}


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """Return a ratio of sums with its percentile bootstrap interval [3].

    Whole items are drawn again, so items that are documents give an interval over documents.

    Args:
        numerators (list of float): one for each item.
        denominators (list of float): likewise. Default: ``None``, all 1: the mean.
        confidence (float): the coverage wanted. Default: ``0.95``.
        resamples (int): how many samples are drawn. Default: ``10000``.
        seed (int): of the draws. Default: ``0``.

    Returns:
        (float, float, float): the ratio, the lower and the upper end; of a single item ``None`` for
        both ends: how much items differ is not known.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if len(top) == 0 or len(top) != len(bottom):
        raise ValueError(
            f"[bootstrap] needs as many numerators as denominators, at least one, but got {len(top)} and {len(bottom)}."
        )
    ratio = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return ratio, None, None
    draws = np.random.default_rng(seed).integers(len(top), size=(resamples, len(top)))
    ratios = top[draws].sum(axis=1) / bottom[draws].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return ratio, float(low), float(high)
