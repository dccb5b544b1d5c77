"""Tests and intervals of two shares on the same rows, against statsmodels, published examples and simulations."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from petals_eval.metrics.paired import (
    cluster_standard_error,
    detectable_share,
    holm,
    mcnemar,
    mcnemar_power,
    newcombe_paired,
)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (5, 0), (1, 7), (48, 39), (30, 30), (2000, 2100)])
def test_mcnemar_is_that_of_statsmodels(counts: tuple[int, int]) -> None:
    first, second = counts
    expected = statsmodels_mcnemar([[10, first], [second, 10]], exact=True).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(float(expected), abs=1e-12)
    assert mcnemar(first, second) == mcnemar(second, first)


@pytest.mark.parametrize(
    ("cells", "published"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998, table II
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2014
        ((320, 48, 39, 93), (-0.019, 0.055)),  # the two published prompts on TREC
    ],
)
def test_newcombes_interval_has_the_published_values(
    cells: tuple[int, int, int, int], published: tuple[float, float]
) -> None:
    found = newcombe_paired(*cells)
    digits = 4 if published[0] == 0.0569 else 3
    assert tuple(round(bound, digits) for bound in found) == published
    both, first, second, neither = cells
    assert newcombe_paired(both, second, first, neither) == pytest.approx((-found[1], -found[0]))


@pytest.mark.parametrize("cells", [(0, 0, 0, 5), (5, 0, 0, 0), (0, 5, 0, 0), (0, 0, 7, 0), (1, 0, 0, 0), (3, 0, 0, 4)])
def test_newcombes_interval_of_edges_is_one_around_the_difference(cells: tuple[int, int, int, int]) -> None:
    low, high = newcombe_paired(*cells)
    difference = (cells[1] - cells[2]) / sum(cells)
    assert -1 <= low <= difference <= high <= 1
    assert low < high


def test_newcombes_interval_covers_from_few_rows_on() -> None:
    random = np.random.default_rng(3)
    for n, cells in ((20, (0.6, 0.2, 0.1, 0.1)), (50, (0.9, 0.05, 0.02, 0.03)), (500, (0.64, 0.1, 0.08, 0.18))):
        drawn, counts = np.unique(random.multinomial(n, cells, size=4000), axis=0, return_counts=True)
        bounds = np.array([newcombe_paired(*map(int, each)) for each in drawn])
        truth = cells[1] - cells[2]
        covered = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
        assert (covered * counts).sum() / counts.sum() >= 0.935


@pytest.mark.parametrize("rows, discordant", [(20, 12), (100, 6), (500, 87), (2_000, 1_000)])
def test_the_power_is_that_of_scipys_binomial_distribution(rows: int, discordant: int) -> None:
    """It sums over how many rows are discordant, and over which of those counts are found significant."""
    share, difference = discordant / rows, discordant / rows / 2
    counts = np.arange(rows + 1)
    least = np.array([(binom.cdf(np.arange(n), n, 0.5) <= 0.025).sum() - 1 for n in counts])
    chances = [binom.cdf(least, counts, 0.5 + sign * difference / (2 * share)) for sign in (1, -1)]
    expected = float((binom.pmf(counts, rows, share) * sum(chances)).sum())
    assert mcnemar_power(rows, share, difference) == pytest.approx(expected, abs=1e-6)


def test_holms_values_are_those_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 40):
        drawn = random.random(count) ** 3
        drawn[: count // 3] = drawn[-1]  # equal ones, too
        assert holm(drawn.tolist()) == pytest.approx(multipletests(drawn, method="holm")[1])


def test_holms_values_are_those_of_his_rule() -> None:
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    p_values = [0.04, 0.001, 0.03, 0.5]
    by_hand = {0.001: 0.004, 0.03: 0.09, 0.04: 0.09, 0.5: 0.5}
    assert holm(p_values) == pytest.approx([by_hand[p] for p in p_values])


@pytest.mark.parametrize(("rows", "discordant"), [(50, 12), (500, 87), (2000, 100)])
def test_the_detectable_difference_is_found_in_four_of_five_data_sets(rows: int, discordant: int) -> None:
    share, found = discordant / rows, detectable_share(rows, discordant)
    assert found is not None
    random = np.random.default_rng(rows)
    cells = [(share + found) / 2, (share - found) / 2, 1 - share]
    drawn, counts = np.unique(random.multinomial(rows, cells, size=4000)[:, :2], axis=0, return_counts=True)
    rejected = [mcnemar(*map(int, each)) <= 0.05 for each in drawn]
    assert np.average(rejected, weights=counts) == pytest.approx(0.8, abs=0.02)


def test_what_is_detectable_follows_connors_formula_and_is_none_where_nothing_is() -> None:
    assert detectable_share(500, 0) is None
    assert detectable_share(500, 5) is None
    exact, normal = (detectable_share(10 * n, n) for n in (1000, 1001))
    assert exact is not None and normal == pytest.approx(exact, rel=0.02)
    rows, share = 10_010, 0.1
    needed = (1.959964 * math.sqrt(share) + 0.841621 * math.sqrt(share - normal**2)) ** 2 / normal**2
    assert needed == pytest.approx(rows, rel=1e-4)


def test_cluster_robust_errors_are_those_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    clusters = np.sort(random.integers(0, 12, 200))
    clusters = np.unique(clusters, return_inverse=True)[1]
    terms = random.normal(size=200) + random.normal(size=12)[clusters]
    fitted = OLS(terms, np.ones(200)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "df_correction": True, "use_correction": True}
    )
    assert cluster_standard_error(terms, clusters) == pytest.approx(float(fitted.bse[0]))
    alone = cluster_standard_error(terms, np.arange(200))
    assert alone == pytest.approx(np.std(terms, ddof=1) / math.sqrt(200))
    assert math.isnan(cluster_standard_error(terms, np.zeros(200, dtype=np.int64)))
