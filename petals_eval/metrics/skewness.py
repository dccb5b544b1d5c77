"""The 95% interval of a single number: from what each row contributes, corrected for skewness.

An estimate moves with every row by that row's influence. The sum of their squares is its variance, and that of their
cubes its third moment. With standard error s and skewness g the interval is

    estimate + s g z^2 / 2  -+  z s sqrt(1 + g^2 z^2 / 4)

the score interval of a Poisson count, moved and scaled until it has this s and this g: where g is that of a share, it
is Wilson's interval but for terms of the order 1/n^2, and where g is 0 it is the normal one. z is Student's quantile
for n - 1 degrees of freedom. Like Wilson's it is longer on the side of which the rows say less, where the normal
interval and the percentile bootstrap are too short.

Sources: M. S. Bartlett, "Approximate confidence intervals" (1953), for the correction of a score by its skewness; L. A.
Jaeckel, "The infinitesimal jackknife" (1972), for influences. How well it covers: `petals_eval/guides/formulae.md`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from petals_eval.metrics.intervals import Floats, Tallies, student_quantile

__all__ = ["Bounds", "cells_influences", "degrees_of_freedom", "fewest_rows", "influence_interval"]

_STEP = 1e-4  # rows; small beside one, large beside what rounding does to a metric


class Bounds(NamedTuple):
    """Intervals of estimates, and the skewness that they were corrected for; each (...,)."""

    low: Floats
    high: Floats
    skewness: Floats


def influence_interval(
    value: Floats | float,
    influences: Floats,
    counts: Floats | None = None,
    *,
    rows: Floats | int,
    degrees: Floats | float | None = None,
    is_skewed: bool = True,
) -> Bounds:
    """Return the bounds of estimates.

    value: (...,). influences: (..., m), how much one row of a kind moves the estimate; over all rows they sum to 0.
    counts: (..., m) rows of each kind; None: one of each. rows: how many there are together.
    degrees: of freedom of the standard error; None: one less than rows. is_skewed: False on a scale that takes the
    skewness away: the bounds are at equal distances.

    >>> terms = np.repeat([0.0, 1.0], [132, 368])  # Wilson's interval of 368 of 500 is 0.6957 to 0.7727
    >>> bounds = influence_interval(0.736, (terms - 0.736) / 500, rows=500)
    >>> round(float(bounds.low), 4), round(float(bounds.high), 4)
    (0.6954, 0.773)
    """
    weights = np.ones(()) if counts is None else counts
    error = np.sqrt((weights * influences**2).sum(axis=-1))
    third = (weights * influences**3).sum(axis=-1)
    skewness = np.divide(third, error**3, out=np.zeros_like(error), where=error > 0)
    quantile = student_quantile(np.maximum(np.asarray(rows) - 1 if degrees is None else degrees, 1))
    corrected = skewness if is_skewed else np.zeros_like(skewness)
    centre = value + error * corrected * quantile**2 / 2
    half = quantile * error * np.sqrt(1 + corrected**2 * quantile**2 / 4)
    return Bounds(centre - half, centre + half, skewness)


def degrees_of_freedom(influences: Floats) -> float:
    """Return the degrees of freedom that the standard error of an estimate has: few where few rows make most of it.

    influences: (n,), one of each row. Of rows that are normal it is n, at most.
    Source: F. E. Satterthwaite, "An approximate distribution of estimates of variance components" (1946): those of the
    chi-squared distribution with the mean and the variance of the squared error, this variance by the fourth moment.

    >>> round(degrees_of_freedom(np.array([1.0, -1.0] * 50 + [9.0, -9.0])), 1)
    10.9
    """
    squares = influences**2
    total = float(squares.sum())
    if total == 0:
        return float(len(influences))
    uneven = float((squares**2).sum()) / total**2 - 1 / len(influences)
    return min(float(len(influences)), 2 / uneven) if uneven > 0 else float(len(influences))


def cells_influences(confusion: Floats, metric: Callable[[Tallies], Floats]) -> tuple[Floats, Floats]:
    """Return the influences of the cells of confusion matrices on a metric, and the counts that they have there.

    confusion: (sets, labels, labels); row = label. metric: of tallies, one value for each set. Both answers are like
    `confusion`. They are those of a table in which each label has one row more, which is right as often as rows are
    altogether, at unchanged totals: a label without a mistake so far is not without any for ever.
    """
    table = _smoothed(confusion)
    parts = [np.einsum("...ii->...i", table), table.sum(axis=2), table.sum(axis=1)]
    by_right, by_label, by_prediction = (_slopes(metric, parts, which) for which in range(3))
    influences = by_label[:, :, None] + by_prediction[:, None, :]
    place = np.arange(table.shape[1])
    influences[:, place, place] += by_right
    means = (table * influences).sum(axis=(1, 2)) / confusion.sum(axis=(1, 2))
    return influences - means[:, None, None], table


def fewest_rows(confusion: Floats) -> Floats:
    """Return (sets,) of how many rows the rarest label has, of those that occur or are predicted."""
    labelled, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    fewest: Floats = np.where(labelled + predicted > 0, labelled, np.inf).min(axis=1)
    return fewest


def _smoothed(confusion: Floats) -> Floats:
    labels = confusion.shape[1]
    labelled = confusion.sum(axis=2, keepdims=True)
    right = np.einsum("...ii->...", confusion)
    accuracy = ((right + 1) / (labelled.sum(axis=(1, 2)) + 2))[:, None, None]
    expected = np.where(np.eye(labels, dtype=bool), accuracy, (1 - accuracy) / max(1, labels - 1))
    table: Floats = (confusion + expected) * labelled / (labelled + 1)
    return table


def _slopes(metric: Callable[[Tallies], Floats], parts: list[Floats], which: int) -> Floats:
    """Return (sets, labels): how much a metric moves with one row more in each of the right, labelled or predicted."""
    sets, labels = parts[which].shape
    found = np.empty((sets, labels))
    for label in range(labels):
        values = []
        for step in (_STEP, -_STEP):
            moved = list(parts)
            moved[which] = parts[which].copy()
            moved[which][:, label] += step
            values.append(metric(Tallies(*moved)))
        found[:, label] = (values[0] - values[1]) / (2 * _STEP)
    return found
