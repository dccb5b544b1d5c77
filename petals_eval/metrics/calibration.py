"""Expected calibration error, and the bins that it is computed over."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.intervals import Floats

__all__ = ["BINS", "Bins", "confidence_bins", "ece"]

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


@dataclass(frozen=True, eq=False)
class Bins:
    """What a reliability diagram shows, of each of the `BINS` bins.

    counts: rows in it. confidence, accuracy: their mean confidence and the share that is right; NaN of none.
    """

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]


def confidence_bins(labels: ArrayLike, predictions: ArrayLike, probabilities: ArrayLike) -> Bins:
    """Return the bins of a reliability diagram: those of `ece`.

    labels, predictions: (n,) indices of labels. probabilities: (n, labels).

    >>> found = confidence_bins([0, 1, 1], [0, 1, 0], [[0.9, 0.1], [0.1, 0.9], [0.7, 0.3]])
    >>> found.counts[10], found.accuracy[10], found.counts[13], found.accuracy[13], found.confidence[13]
    (1, 0.0, 2, 1.0, 0.9)
    """
    truth, predicted = np.asarray(labels), np.asarray(predictions)
    confidence = np.asarray(probabilities, dtype=np.float64)[np.arange(len(truth)), predicted]
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = np.bincount(bins, confidence, BINS) / counts
        right = np.bincount(bins, truth == predicted, BINS) / counts
    return Bins(tuple(counts.tolist()), tuple(means.tolist()), tuple(right.tolist()))


def _bins(confidence: Floats) -> np.ndarray:
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def gaps(labels: np.ndarray, predictions: np.ndarray, probabilities: Floats) -> Floats:
    """(n, bins) with [right] - confidence in the example's bin and 0 elsewhere: the error is the sum of the absolute
    column means."""
    confidence = probabilities[np.arange(len(labels)), predictions]
    return np.eye(BINS)[_bins(confidence)] * ((labels == predictions) - confidence)[:, None]


def measure_ece(answers: Answers) -> list[Metric]:
    value = ece(answers.labels, answers.predictions, answers.probabilities)
    # A sum of absolute values: what chance does to a bin adds to it, and so does resampling.
    note = "no interval: chance adds to it, the more the fewer rows there are"
    return [Metric("ece", value, None, note)]
