"""The shared statistics, against SciPy and published values."""

import numpy as np
import pytest

from mlx_dsa.evals.report.stats import bootstrap, mcnemar, paired_proportions, smallest_difference, wilson

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("n", [1, 7, 20, 100, 1319])
def test_wilson_is_scipys(n):
    for successes in {0, 1, n // 3, n - 1, n}:
        if 0 <= successes <= n:
            theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
            assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_a_published_example():
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_wilson_says_nothing_of_nothing_and_refuses_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and n = 5 but got 6"):
        wilson(6, 5)


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (12, 12), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected)
    assert mcnemar(b, c) == mcnemar(c, b)


@pytest.mark.parametrize("n, discordant", [(100, 0), (100, 6), (100, 17), (200, 50), (1319, 300)])
def test_smallest_difference_is_the_edge_of_significance(n, discordant):
    found = round(smallest_difference(n, discordant) * n)
    total = max(discordant, 6)
    assert mcnemar((total + found) // 2, (total - found) // 2) < 0.05
    fewer = found - 2
    assert fewer < 0 or mcnemar((total + fewer) // 2, (total - fewer) // 2) >= 0.05


def test_five_pairs_can_show_nothing():
    assert smallest_difference(5) is None
    assert smallest_difference(6) == 1.0


def test_pairs_are_counted_item_by_item():
    pair = paired_proportions([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert (pair["both"], pair["only_first"], pair["only_second"], pair["neither"]) == (1, 2, 1, 1)
    assert pair["difference"] == pytest.approx(0.2)
    assert (pair["retained"], pair["retained_low"]) == (0.5, wilson(1, 2)[0])
    assert paired_proportions([1], [0])["retained"] is None
    with pytest.raises(ValueError, match="one length but got 1 and 2"):
        paired_proportions([1], [1, 0])


def test_bootstrap_of_a_mean_is_scipys():
    values = np.random.default_rng(0).gamma(2.0, size=40)
    mean, low, high = bootstrap(values, seed=1)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, random_state=2)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)


def test_bootstrap_of_a_ratio_weighs_documents_by_their_tokens():
    mean, low, high = bootstrap([10.0, 1.0], [100, 1], seed=0)
    assert mean == pytest.approx(11 / 101)
    assert low == pytest.approx(0.1) and high == pytest.approx(1.0)
    assert bootstrap([1.0, 2.0, 4.0], seed=3) == bootstrap([1.0, 2.0, 4.0], seed=3)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
