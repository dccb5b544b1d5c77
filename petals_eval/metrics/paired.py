"""Two sides on the same rows: tests and intervals of the difference between two shares, and what could be detected.

A row is discordant where one side is right and the other is wrong: the concordant ones say nothing about who is better.
"""

import math
from collections.abc import Sequence

import numpy as np

from petals_eval.metrics.intervals import Floats, wilson

__all__ = [
    "POWER",
    "cluster_standard_error",
    "detectable_share",
    "holm",
    "mcnemar",
    "mcnemar_power",
    "newcombe_paired",
]

POWER = 0.8
LEVEL = 0.05
_MOST_EXACT = 1000  # discordant rows; from there on the normal form of the power is within 1% of the exact one


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: that of the discordant rows under a fair coin.

    only_first, only_second: how many rows only that side has right. 1.0 where there are none.
    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions" (1947), with the
    binomial distribution instead of its normal form.

    >>> round(mcnemar(48, 39), 3), mcnemar(0, 0), round(mcnemar(1, 7), 4)
    (0.391, 1.0, 0.0703)
    """
    from scipy.special import bdtr  # as in all of this module: `scipy.stats` takes longer to import than a small run

    # The coin is fair, and so both tails are alike.
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Return the 95% interval of the first share minus the second on the same rows, in [-1, 1].

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998), method 10: the Wilson intervals of the two shares, joined by
    their correlation, which is corrected for continuity where it is positive.

    >>> [round(bound, 3) for bound in newcombe_paired(1, 1, 7, 12)]  # Bentur et al. 2009, as Fagerland et al. have it
    [-0.507, -0.026]
    """
    total = both + only_first + only_second + neither
    first, second = (both + only_first) / total, (both + only_second) / total
    low1, high1 = wilson(both + only_first, total)
    low2, high2 = wilson(both + only_second, total)
    down1, up1, down2, up2 = first - low1, high1 - first, second - low2, high2 - second
    margins = (both + only_first, only_second + neither, both + only_second, only_first + neither)
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - total / 2, 0.0)
    # The root of each: their product may be beyond what a float holds.
    phi = product / math.prod(map(math.sqrt, margins)) if all(margins) else 0.0
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return max(-1.0, first - second - below), min(1.0, first - second + above)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold for all of these tests together, whatever they have in common.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure" (1979). Here and not by statsmodels: its
    import takes a second, and each of its calls collects garbage.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given)
    corrected = np.empty(len(given))
    corrected[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)), 1.0)
    found: list[float] = corrected.tolist()
    return found


def detectable_share(rows: int, discordant: int) -> float | None:
    """Return the smallest difference of two shares that McNemar's exact test finds at 5% with a power of 80%.

    rows: how many there are. discordant: how many of them; their share is taken as given.
    None where no difference can be found: with this share of discordant rows even one side being right in all of them
    would be missed too often.

    Source: R. J. Connor, "Sample size for testing differences in proportions for the paired-sample design" (1987),
    solved for the difference. With at most 1,000 discordant rows the power is the exact one.

    >>> round(detectable_share(500, 87), 3), detectable_share(50, 3)
    (0.054, None)
    """
    share = discordant / rows
    if discordant <= _MOST_EXACT:
        return _smallest(rows, share)
    from scipy.special import ndtri

    alpha, beta = ndtri(1 - LEVEL / 2), ndtri(POWER)
    middle = alpha * math.sqrt(share * rows)
    square = rows + beta**2
    constant = (alpha**2 - beta**2) * share
    found = (middle + math.sqrt(middle**2 - square * constant)) / square
    return float(found) if found <= share else None


def _smallest(rows: int, share: float) -> float | None:
    """Find it by halving: the power rises with the difference."""
    low, high = 0.0, share
    if share == 0 or mcnemar_power(rows, share, share) < POWER:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(rows, share, middle) >= POWER else (middle, high)
    return high


def mcnemar_power(rows: int, share: float, difference: float) -> float:
    """Return the power of McNemar's exact test, over every number of discordant rows that such data may have.

    share: of discordant rows. difference: of the two shares of right answers, at most as large.
    """
    from scipy.special import bdtrik, betaln, xlog1py, xlogy

    spread = 6 * math.sqrt(rows * share * (1 - share)) + 1
    counts = np.arange(max(0, math.floor(rows * share - spread)), min(rows, math.ceil(rows * share + spread)) + 1)
    better = (share + difference) / (2 * share)
    # The most that the worse side may have for a p-value of 5%: twice the lower tail.
    least = np.nan_to_num(np.floor(bdtrik(LEVEL / 2, counts, 0.5)), nan=-1)
    least = np.where(_lower_tail(least, counts, 0.5) > LEVEL / 2, least - 1, least)
    rejected = _lower_tail(least, counts, 1 - better) + _lower_tail(least, counts, better)
    ways = -betaln(rows - counts + 1, counts + 1) - math.log(rows + 1)
    chance = np.exp(ways + xlogy(counts, share) + xlog1py(rows - counts, -share))
    return float((chance * rejected).sum())


def _lower_tail(at_most: Floats, trials: np.ndarray, chance: float) -> Floats:
    """Return the binomial probability of so many or fewer; bdtr knows none of less than 0."""
    from scipy.special import bdtr

    return np.where(at_most < 0, 0.0, bdtr(np.maximum(at_most, 0), trials, chance))


def cluster_standard_error(terms: Floats, clusters: np.ndarray) -> float:
    """Return the standard error of the mean of terms (n,) of which those of one cluster may depend on each other.

    clusters: int64 (n,), from 0. NaN with a single cluster.
    Source: K.-Y. Liang and S. L. Zeger, "Longitudinal data analysis using generalized linear models" (1986), with the
    factor G / (G - 1) for G clusters.

    >>> round(cluster_standard_error(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1])), 4)
    0.5
    """
    sums = np.bincount(clusters, weights=terms - terms.mean())
    count = len(sums)
    return math.sqrt(count / (count - 1) * (sums**2).sum()) / len(terms) if count > 1 else math.nan
