"""What intervals are made of: Wilson's for a share, the percentiles of resamples, and tallies of these.

The cost of a bootstrap is bounded in a stated way: 1,000 resamples, but at most `MAX_DRAWS` weights drawn for one
metric and never fewer than `MIN_RESAMPLES` resamples. What is computed from fewer than 1,000 says so.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petals_eval.errors import DataError

__all__ = [
    "RESAMPLES",
    "Tallies",
    "affordable",
    "paired",
    "percentile_interval",
    "row_weights",
    "student_quantile",
    "wilson",
]

RESAMPLES = 1000
MIN_RESAMPLES = 100
MAX_DRAWS = 100_000_000
Z95 = 1.959963984540054  # the 0.975 quantile of the normal distribution

Floats = NDArray[np.float64]


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share, 95%, in [0, 1].

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927),
    without continuity correction.

    >>> [round(bound, 4) for bound in wilson(368, 500)]
    [0.6957, 0.7727]
    >>> [round(bound, 4) for bound in wilson(1, 1)]
    [0.2065, 1.0]
    """
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return low, high


def student_quantile(degrees: ArrayLike) -> Floats:
    """Return the 0.975 quantiles of Student's t for degrees of freedom from 1 on.

    >>> [round(float(each), 4) for each in student_quantile([1, 20, 21, 100])]
    [12.7062, 2.086, 2.0796, 1.984]
    """
    from scipy.special import stdtrit  # not scipy.stats, whose import takes longer than a small run

    return np.asarray(stdtrit(np.asarray(degrees, dtype=np.float64), 0.975))


def affordable(work_per_resample: int) -> int:
    """Return how many resamples fit into `MAX_DRAWS`: at most `RESAMPLES`, at least `MIN_RESAMPLES`.

    >>> affordable(10_000), affordable(400_000), affordable(50_000_000)
    (1000, 250, 100)
    """
    return max(MIN_RESAMPLES, min(RESAMPLES, MAX_DRAWS // max(1, work_per_resample)))


def percentile_interval(values: ArrayLike) -> tuple[float, float] | None:
    """Return the 2.5th and 97.5th percentile of `values` (resamples,).

    Resamples on which the metric is not defined (NaN) are left out; None where that is half of them or more.

    >>> percentile_interval([float(n) for n in range(1001)])
    (25.0, 975.0)
    """
    given = np.asarray(values, dtype=np.float64)
    defined = given[~np.isnan(given)]
    if 2 * len(defined) <= len(given):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Tallies:
    """All that metrics of counts need. Each array is float64 (resamples, labels) and holds whole numbers.

    right: examples of the label that were predicted as it.
    labelled: examples of the label.
    predicted: examples predicted as it.
    """

    right: Floats
    labelled: Floats
    predicted: Floats

    @property
    def total(self) -> Floats:
        """The number of examples, (resamples,)."""
        return self.labelled.sum(axis=1)

    @classmethod
    def of(cls, labels: ArrayLike, predictions: ArrayLike, n_labels: int | None = None) -> "Tallies":
        """Return the tallies of the examples themselves: one row. n_labels: None for those up to the highest label."""
        truth, predicted = paired(labels, predictions, n_labels)
        n_labels = n_labels or 1 + max(int(truth.max()), int(predicted.max()))
        cells, counts = _cells(truth, predicted, n_labels)
        return cls._of_draws(counts[None, :], cells, n_labels)

    @classmethod
    def weighted(
        cls, labels: NDArray[np.int64], predictions: NDArray[np.int64], n_labels: int
    ) -> "Callable[[Floats], Tallies]":
        """Return what gives the tallies of resamples in which example i is weights[i] times, (n, resamples)."""
        from scipy.sparse import csr_array

        n = len(labels)
        cells, place = np.unique(labels * n_labels + predictions, return_inverse=True)
        in_cell = csr_array((np.ones(n), (place.reshape(-1), np.arange(n))), shape=(len(cells), n))
        return lambda weights: cls._of_draws((in_cell @ weights).T, cells, n_labels)

    @classmethod
    def _of_draws(cls, draws: NDArray[np.int64] | Floats, cells: NDArray[np.int64], n_labels: int) -> "Tallies":
        label, prediction = np.divmod(cells, n_labels)
        one_hot = np.eye(n_labels)
        weights = draws.astype(np.float64)
        return cls(
            weights @ (one_hot[label] * (label == prediction)[:, None]),
            weights @ one_hot[label],
            weights @ one_hot[prediction],
        )


def paired(
    labels: ArrayLike, predictions: ArrayLike, n_labels: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return labels and predictions as int64 (n,).

    Raises DataError for none, for arrays that do not belong together, and for indices below 0 or from n_labels on:
    numpy would count these somewhere else.
    """
    truth, predicted = np.asarray(labels), np.asarray(predictions)
    if truth.ndim != 1 or truth.shape != predicted.shape or not len(truth):
        raise DataError(
            f"Expected one prediction for each of one or more labels; found labels of shape {truth.shape} and "
            f"predictions of shape {predicted.shape}."
        )
    both = np.concatenate([truth, predicted])
    if both.dtype.kind not in "iubf" or not (both == np.rint(both)).all():  # the journal's are whole numbers as floats
        raise DataError(f"Expected labels and predictions as whole numbers; found {both.dtype}.")
    if both.min() < 0 or (n_labels is not None and both.max() >= n_labels):
        top = "" if n_labels is None else f" to {n_labels - 1}"
        raise DataError(f"Expected labels and predictions from 0{top}; found {both.min()} to {both.max()}.")
    return truth.astype(np.int64), predicted.astype(np.int64)


def _cells(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], n_labels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cells of the confusion matrix that are not empty, and their counts."""
    cells, counts = np.unique(labels * n_labels + predictions, return_counts=True)
    return cells, counts


def row_weights(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each of n examples is in each resample: `resamples` arrays (n,).

    The first k are the same whatever `resamples` is, so one seed gives one interval.
    """
    random = np.random.default_rng([seed, 1])
    for _ in range(resamples):
        yield np.bincount(random.integers(0, n, size=n), minlength=n)
