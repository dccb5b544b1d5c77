"""Log loss and the Brier score: how good the probabilities are, not only the answers."""

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.estimates import mean_of
from petals_eval.metrics.intervals import Floats

__all__ = ["brier", "log_loss"]

# Most of what these sum up stands in the wrong rows: with fewer of them others might as well be missing. One row moves
# the log loss further than the Brier score, so its interval needs more of them.
FEW_ERRORS = {"log_loss": 30, "brier": 10}


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean of -ln p(label), in nats. A probability of 0 counts as 2.2e-16, float64's epsilon, as in
    scikit-learn.

    >>> round(log_loss([0, 1], [[0.9, 0.1], [0.4, 0.6]]), 4)
    0.3081
    """
    return float(losses(np.asarray(labels), np.asarray(probabilities, dtype=np.float64)).mean())


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean over examples of the sum over labels of (p(k) - [k is the label])^2, in [0, 2]; 0 is perfect.

    The definition of G. W. Brier, "Verification of forecasts expressed in terms of probability" (1950), for any number
    of labels. With two labels it is twice the form that looks at one label only.

    >>> round(brier([0, 1], [[0.9, 0.1], [0.4, 0.6]]), 4)
    0.17
    """
    return float(squared_errors(np.asarray(labels), np.asarray(probabilities, dtype=np.float64)).mean())


def squared_errors(labels: np.ndarray, probabilities: Floats) -> Floats:
    """Return (n,) terms of the Brier score, which is their mean."""
    return ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1)


def losses(labels: np.ndarray, probabilities: Floats) -> Floats:
    """Return (n,) terms of the log loss, which is their mean."""
    tiny = np.finfo(np.float64).eps
    return -np.log(np.clip(probabilities[np.arange(len(labels)), labels], tiny, 1 - tiny))


def log_loss_terms(answers: Answers) -> dict[str, Floats]:
    return {"log_loss": losses(answers.labels, answers.probabilities)}


def brier_terms(answers: Answers) -> dict[str, Floats]:
    return {"brier": squared_errors(answers.labels, answers.probabilities)}


def measure_log_loss(answers: Answers) -> list[Metric]:
    return [_mean(answers, log_loss_terms(answers), np.inf)]


def measure_brier(answers: Answers) -> list[Metric]:
    return [_mean(answers, brier_terms(answers), 2.0)]


def _mean(answers: Answers, terms: dict[str, Floats], highest: float) -> Metric:
    [(name, each)] = terms.items()
    is_rough = int((answers.labels != answers.predictions).sum()) < FEW_ERRORS[name]
    return mean_of(name, each, answers.clusters, limits=(0.0, highest), is_rough=is_rough, may_be_heavy=False)
