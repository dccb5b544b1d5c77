"""Expected calibration error."""

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.intervals import Floats

__all__ = ["BINS", "ece"]

BINS = 15


def ece(labels: ArrayLike, predictions: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the error in [0, 1]: the sum over bins of (share of examples) x |accuracy - mean confidence|.

    Confidence is the probability of the prediction. 15 bins of equal width, each without its left end and with its
    right. Source: C. Guo and others, "On calibration of modern neural networks", ICML 2017, equation 3.

    >>> round(ece([0, 1, 1], [0, 1, 0], [[0.9, 0.1], [0.1, 0.9], [0.7, 0.3]]), 4)
    0.3
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    return float(np.abs(gaps(np.asarray(labels), np.asarray(predictions), shares).mean(axis=0)).sum())


def gaps(labels: np.ndarray, predictions: np.ndarray, probabilities: Floats) -> Floats:
    """(n, bins) with [right] - confidence in the example's bin and 0 elsewhere: the error is the sum of the absolute
    column means."""
    confidence = probabilities[np.arange(len(labels)), predictions]
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return np.eye(BINS)[bins] * ((labels == predictions) - confidence)[:, None]


def measure_ece(answers: Answers) -> list[Metric]:
    value = ece(answers.labels, answers.predictions, answers.probabilities)
    # A sum of absolute values: what chance does to a bin adds to it, and so does resampling.
    note = "no interval: chance adds to it, the more the fewer rows there are"
    return [Metric("ece", value, None, note)]
