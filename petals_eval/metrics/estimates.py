"""A metric with its interval: shares by Wilson, everything else by its rows' influences (`skewness.py`).

With clusters the influences of a cluster's rows are added up first (Liang and Zeger, 1986): rows that depend on each
other say less.
When an interval is marked as rough, or left out, is the outcome of a simulation (`petals_eval/guides/formulae.md`).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.intervals import Floats, Tallies, wilson
from petals_eval.metrics.skewness import cells_influences, degrees_of_freedom, fewest_rows, influence_interval

__all__ = [
    "FEW_CLUSTERS",
    "FEW_OF_ALL",
    "are_extreme",
    "are_few_clusters",
    "counted",
    "estimated",
    "mean_of",
    "ratio_of",
    "share_of",
]

FEW_ROWS = 1000  # of terms that know no limit: below, their intervals are marked; from there on, left out where skewed
FEW_DEGREES = 150  # of freedom of their standard error: below, they are marked, too
HEAVY = 0.3  # skewness of an estimate from where on a few rows weigh too much
FEW_ERRORS = 5  # that are to be expected of a label
FEW_OF_ALL = 10  # right or wrong rows
FEW_CLUSTERS = 50  # of equal size
EXTREME = 0.85  # of a share; 1 minus it is as extreme

Clusters = NDArray[np.int64] | None


def estimated(
    name: str,
    value: float,
    influences: Floats,
    clusters: Clusters = None,
    *,
    counts: Floats | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
    note: str | None = None,
    is_rough: bool = False,
    may_be_heavy: bool = False,
    is_symmetric: bool = False,
    back: Callable[[float], float] = float,
) -> Metric:
    """Return a metric with the interval that its influences give.

    value, influences: on the scale that `back` leads back from; those of `influence_interval`. limits: of that scale.
    is_rough: whether the interval may cover too little. may_be_heavy: whether a row may weigh any amount.
    is_symmetric: whether the scale takes the skewness away, and not how unevenly rows weigh.
    """
    sums = influences
    if clusters is not None:
        sums = np.bincount(clusters, weights=influences).astype(np.float64)
        if len(sums) == 1:
            return Metric(name, back(value), None, _joined(note, "no interval of one cluster"))
        sums *= np.sqrt(len(sums) / (len(sums) - 1))
        is_rough = is_rough or are_few_clusters(clusters)
    rows = len(sums) if counts is None else round(float(counts.sum()))
    degrees = degrees_of_freedom(sums) if may_be_heavy or is_symmetric else rows - 1
    bounds = influence_interval(value, sums, counts, rows=rows, degrees=degrees, is_skewed=not is_symmetric)
    low, high, skewness = map(float, bounds)
    if not high > low:
        return Metric(name, back(value), None, _joined(note, "no interval: all rows say the same"))
    if may_be_heavy and rows >= FEW_ROWS and abs(skewness) > HEAVY:
        return Metric(name, back(value), None, _joined(note, "no interval: a few rows weigh too much"))
    is_rough = is_rough or (may_be_heavy and (rows < FEW_ROWS or degrees < FEW_DEGREES))
    ci95 = back(max(limits[0], low)), back(min(limits[1], high))
    return Metric(name, back(value), ci95, note, is_rough=is_rough)


def are_extreme(accuracy: Floats | float, rarest: Floats | float) -> NDArray[np.bool_]:
    """Return whether exceptions are rare: rows are nearly all right, or nearly all wrong, and fewer than `FEW_ERRORS`
    of the others are to be expected of the rarest label, which has so many rows."""
    few = np.minimum(accuracy, 1 - accuracy) * rarest < FEW_ERRORS
    return few & (np.abs(np.asarray(accuracy) - 0.5) > EXTREME - 0.5)


def are_few_clusters(clusters: NDArray[np.int64]) -> bool:
    """Return whether clusters (n,), from 0, are too few to rely on, or some so large that most of them hardly count.

    They weigh as much as N^2 / sum(n_g^2) clusters of equal size, with n_g rows of N in each.
    """
    sizes = np.bincount(clusters)
    equal = float(sizes.sum()) ** 2 / float((sizes.astype(np.float64) ** 2).sum())
    return equal < max(FEW_CLUSTERS, len(sizes) / 2)


def share_of(name: str, right: Floats, clusters: Clusters = None, *, note: str | None = None) -> Metric:
    """Return the share of rows that are right, of (n,) zeros and ones; without clusters with Wilson's interval."""
    value, count = float(right.mean()), int(right.sum())
    is_rough = min(count, len(right) - count) < FEW_OF_ALL
    if clusters is None:
        return Metric(name, value, wilson(count, len(right)), note, is_rough=is_rough)
    influences = (right - value) / len(right)
    return estimated(name, value, influences, clusters, limits=(0.0, 1.0), note=note, is_rough=is_rough)


def mean_of(
    name: str,
    terms: Floats,
    clusters: Clusters = None,
    *,
    limits: tuple[float, float] = (0.0, np.inf),
    note: str | None = None,
    is_rough: bool = False,
    may_be_heavy: bool = True,
) -> Metric:
    """Return the mean of what rows give, (n,)."""
    value = float(terms.mean())
    return estimated(
        name,
        value,
        (terms - value) / len(terms),
        clusters,
        limits=limits,
        note=note,
        is_rough=is_rough,
        may_be_heavy=may_be_heavy,
    )


def ratio_of(
    name: str,
    numerators: Floats,
    denominators: Floats,
    clusters: Clusters = None,
    *,
    limits: tuple[float, float] = (0.0, np.inf),
    back: Callable[[float], float] = float,
    may_be_heavy: bool = True,
) -> Metric:
    """Return the sum of numerators over that of denominators, (n,) each, not all of the latter 0."""
    total = denominators.sum()
    value = float(numerators.sum() / total)
    influences = (numerators - value * denominators) / total
    return estimated(name, value, influences, clusters, limits=limits, back=back, may_be_heavy=may_be_heavy)


def counted(
    name: str,
    value: float,
    answers: Answers,
    metric: Callable[[Tallies], Floats],
    *,
    lowest: float = 0.0,
    fewest: int = 0,
    note: str | None = None,
) -> Metric:
    """Return a metric of counts.

    metric: of tallies, one value for each of them. fewest: rows that each label must have for an interval.
    """
    confusion = answers.counts[None]
    rarest = float(fewest_rows(confusion)[0])
    if rarest < fewest:
        rows = "1 row" if rarest == 1 else f"{rarest:.0f} rows"
        return Metric(name, value, None, _joined(note, f"no interval: a label has {rows}, expected {fewest} at least"))
    influences, counts = cells_influences(confusion, metric)
    accuracy = float((answers.labels == answers.predictions).mean())
    is_rough = bool(are_extreme(accuracy, rarest))
    if answers.clusters is not None:
        of_rows = influences[0][answers.labels, answers.predictions]
        return estimated(
            name, value, of_rows - of_rows.mean(), answers.clusters, limits=(lowest, 1.0), note=note, is_rough=is_rough
        )
    flat, weights = influences.reshape(-1), counts.reshape(-1)
    return estimated(name, value, flat, counts=weights, limits=(lowest, 1.0), note=note, is_rough=is_rough)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(filter(None, notes)) or None
