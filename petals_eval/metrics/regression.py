"""Metrics of numbers: correlations, squared and absolute errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petals_eval.errors import DataError
from petals_eval.metrics.answers import Metric
from petals_eval.metrics.estimates import estimated, mean_of
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.resampling import Resampler
from petals_eval.metrics.scored_rows import ScoredRows

__all__ = ["Numbers", "mae", "mse", "pearson", "spearman"]

PASSES = 4  # over the examples for one resample of a correlation, in the time that drawing its weights takes


@dataclass(frozen=True, eq=False)
class Numbers:
    """labels, predictions: float64 (n,), finite, of examples that have a label.

    clusters: int64 (n,), of rows that may depend on each other; None: of none.
    """

    labels: Floats
    predictions: Floats
    clusters: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "Numbers":
        """Return the labelled ones of rows with one number each, their first column.

        Raises DataError where a row has several.
        """
        known = rows.labelled()
        odd = known.items != 1
        if odd.any():
            row = int(np.argmax(odd))
            raise DataError(f"Metrics of a regression need one number a row; row {row} has {known.items[row]}.")
        return cls(known.labels, known.values[:, 0], known.clusters)


def pearson(labels: ArrayLike, predictions: ArrayLike) -> float | None:
    """Return Pearson's correlation in [-1, 1]; None where either is the same everywhere, for that is 0/0.

    >>> pearson([1, 2, 3], [2, 4, 6]), pearson([1, 2, 3], [1, 1, 1])
    (1.0, None)
    """
    truth, found = _arrays(labels, predictions)
    value = _correlation(truth, found, np.ones(len(truth), dtype=np.int64))
    return None if np.isnan(value) else value


def spearman(labels: ArrayLike, predictions: ArrayLike) -> float | None:
    """Return Spearman's correlation in [-1, 1]: Pearson's of the ranks, where equal numbers share the mean of theirs.
    None where either is the same everywhere.

    >>> spearman([1, 2, 3, 3], [0.1, 0.2, 9.0, 9.0]), spearman([1, 1], [1, 2])
    (1.0, None)
    """
    truth, found = _arrays(labels, predictions)
    every = np.ones(len(truth), dtype=np.int64)
    return pearson(_Ranks(truth).of(every), _Ranks(found).of(every))


def mse(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the mean squared error.

    >>> mse([1, 2], [1, 4])
    2.0
    """
    truth, found = _arrays(labels, predictions)
    return float(np.mean((truth - found) ** 2))


def mae(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the mean absolute error.

    >>> mae([1, 2], [1, 4])
    1.0
    """
    truth, found = _arrays(labels, predictions)
    return float(np.mean(np.abs(truth - found)))


def _arrays(labels: ArrayLike, predictions: ArrayLike) -> tuple[Floats, Floats]:
    return np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)


def _correlation(one: Floats, other: Floats, weights: np.ndarray) -> float:
    """Return Pearson's correlation of a resample with example i `weights[i]` times in it; NaN where it is 0/0."""
    drawn = weights > 0
    if any(values[drawn].min() == values[drawn].max() for values in (one, other)):
        return float("nan")  # looked at exactly: rounding leaves a constant a little spread
    total = weights.sum()
    one, other = one - weights @ one / total, other - weights @ other / total
    spread = np.sqrt((weights @ one**2) * (weights @ other**2))
    return float(np.clip((weights @ (one * other)) / spread, -1.0, 1.0)) if spread > 0 else float("nan")


class _Ranks:
    """Numbers sorted once, so that the ranks in a resample cost no sort."""

    def __init__(self, values: Floats):
        self._place = np.unique(values, return_inverse=True)[1].reshape(-1)

    def of(self, weights: np.ndarray) -> Floats:
        """Return (n,) ranks, from 1, in a resample with example i `weights[i]` times in it; equals share their mean."""
        counts = np.bincount(self._place, weights=weights)
        return (np.cumsum(counts) - (counts - 1) / 2)[self._place]


def squared_error_terms(numbers: Numbers) -> dict[str, Floats]:
    return {"mse": (numbers.labels - numbers.predictions) ** 2}


def absolute_error_terms(numbers: Numbers) -> dict[str, Floats]:
    return {"mae": np.abs(numbers.labels - numbers.predictions)}


def pearson_on_draws(numbers: Numbers) -> Resampler:
    def compute(weights: Floats) -> float:
        return _correlation(numbers.labels, numbers.predictions, weights)

    return lambda draws: {"pearson": draws.each(compute)}


def spearman_on_draws(numbers: Numbers) -> Resampler:
    ranks = _Ranks(numbers.labels), _Ranks(numbers.predictions)

    def compute(weights: Floats) -> float:
        return _correlation(ranks[0].of(weights), ranks[1].of(weights), weights)

    return lambda draws: {"spearman": draws.each(compute)}


def measure_pearson(numbers: Numbers) -> list[Metric]:
    value = pearson(numbers.labels, numbers.predictions)
    if value is None:
        return [_undefined("pearson", numbers)]
    one, other = _standard(numbers.labels), _standard(numbers.predictions)
    return [_correlated("pearson", value, one * other - value * (one**2 + other**2) / 2, numbers)]


def measure_spearman(numbers: Numbers) -> list[Metric]:
    value = spearman(numbers.labels, numbers.predictions)
    if value is None:
        return [_undefined("spearman", numbers)]
    n = len(numbers)
    one, other = (_Ranks(values).of(np.ones(n)) / n for values in (numbers.labels, numbers.predictions))
    one, other = one - one.mean(), other - other.mean()
    # A row moves the ranks of those beyond it, too: what it adds there is their mean on its far side.
    beyond = {
        (a, b): _mean_beyond(values, ranks)
        for a, values in enumerate((numbers.labels, numbers.predictions))
        for b, ranks in enumerate((one, other))
    }
    spread = np.mean(one**2), np.mean(other**2)
    covariance = one * other + beyond[0, 1] + beyond[1, 0]
    squares = (one**2 + 2 * beyond[0, 0]) / spread[0] + (other**2 + 2 * beyond[1, 1]) / spread[1]
    influences = covariance / np.sqrt(spread[0] * spread[1]) - value * squares / 2
    return [_correlated("spearman", value, influences - influences.mean(), numbers)]


def measure_mse(numbers: Numbers) -> list[Metric]:
    [terms] = squared_error_terms(numbers).values()
    return [mean_of("mse", terms, numbers.clusters)]


def measure_mae(numbers: Numbers) -> list[Metric]:
    [terms] = absolute_error_terms(numbers).values()
    return [mean_of("mae", terms, numbers.clusters)]


def _standard(values: Floats) -> Floats:
    found: Floats = (values - values.mean()) / values.std()
    return found


def _mean_beyond(values: Floats, terms: Floats) -> Floats:
    """Return (n,) the sum of the terms of rows with a greater value, equal ones counting half, over n."""
    place = np.unique(values, return_inverse=True)[1].reshape(-1)
    sums = np.bincount(place, weights=terms)
    found: Floats = (np.cumsum(sums[::-1])[::-1] - sums / 2)[place] / len(values)
    return found


def _undefined(name: str, numbers: Numbers) -> Metric:
    if len(numbers) == 1:
        return Metric(name, None, None, "not defined for one example")
    constant = [
        what
        for what, values in (("labels", numbers.labels), ("predictions", numbers.predictions))
        if values.min() == values.max()
    ]
    return Metric(name, None, None, f"not defined: all {' and '.join(constant)} are the same")


def _correlated(name: str, value: float, influences: Floats, numbers: Numbers) -> Metric:
    """Return a correlation with the interval of Fisher's z of it, where its spread depends least on its size."""
    if not abs(value) < 1:
        return Metric(name, value, None, "no interval: the rows lie on a line")
    found = estimated(
        name,
        math.atanh(value),
        influences / len(numbers) / (1 - value**2),
        numbers.clusters,
        back=math.tanh,
        may_be_heavy=True,
    )
    return replace(found, value=value)
