"""Matthews correlation."""

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.estimates import counted
from petals_eval.metrics.intervals import Tallies
from petals_eval.metrics.resampling import Resampler

__all__ = ["mcc"]


def mcc(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the correlation in [-1, 1], for any number of labels; 0 where it is 0/0 (scikit-learn's convention).

    Source: J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004).

    >>> round(mcc([0, 0, 1, 1], [0, 0, 1, 0]), 4)
    0.5774
    """
    return float(resampled_mcc(Tallies.of(labels, predictions))[0])


def resampled_mcc(tallies: Tallies) -> np.ndarray:
    """Return (resamples,) correlations from tallies."""
    total2 = tallies.total**2
    covariance = tallies.right.sum(axis=1) * tallies.total - (tallies.labelled * tallies.predicted).sum(axis=1)
    spread = (total2 - (tallies.labelled**2).sum(axis=1)) * (total2 - (tallies.predicted**2).sum(axis=1))
    return np.divide(covariance, np.sqrt(np.maximum(spread, 0.0)), out=np.zeros_like(covariance), where=spread > 0)


def mcc_on_draws(answers: Answers) -> Resampler:
    return lambda draws: {"mcc": resampled_mcc(answers.tallies(draws))}


def measure_mcc(answers: Answers) -> list[Metric]:
    constant = [
        what
        for what, values in (("labels", answers.labels), ("predictions", answers.predictions))
        if (values == values[0]).all()
    ]
    note = f"0 by convention: all {' and '.join(constant)} are the same" if constant else None
    value = mcc(answers.labels, answers.predictions)
    if constant:
        return [Metric("mcc", value, None, note)]
    return [counted("mcc", value, answers, resampled_mcc, lowest=-1.0)]
