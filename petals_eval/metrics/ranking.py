"""The area under the ROC curve."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.estimates import are_extreme, estimated
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.resampling import Resampler
from petals_eval.text import plural

__all__ = ["roc_auc"]

FEWEST_ROWS = 10  # of each label, for an interval


def roc_auc(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Return the area under the ROC curve, in [0, 1]; 0.5 is chance.

    Two labels: of the probability of the second. More: the mean over labels of "this one against the rest", over the
    labels that occur. None where fewer than two labels occur.

    >>> roc_auc([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    0.75
    >>> roc_auc([1, 1], [[0.5, 0.5], [0.2, 0.8]]) is None
    True
    """
    truth, shares = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    present = np.unique(truth)
    if len(present) < 2:
        return None
    once = np.ones(len(truth))
    ranked = _ranked(present, shares.shape[1])
    return float(np.mean([_Ranking(truth == k, shares[:, k]).area(once) for k in ranked]))


def _ranked(present: np.ndarray, n_labels: int) -> list[int]:
    """Return the labels whose probabilities are ranked against the rest."""
    return [1] if n_labels == 2 else present.tolist()


class _Ranking:
    """The examples sorted once by one label's probability, so that a resample costs no sort.

    The area is the share of (positive, negative) pairs in the right order, ties counting half (Mann and Whitney 1947).
    """

    def __init__(self, positive: np.ndarray, scores: Floats):
        order = np.argsort(scores, kind="stable")
        self._positive, self._negative = order[positive[order]], order[~positive[order]]
        # Negatives that score less than each positive, and those that score no more.
        ranked = scores[self._negative]
        self._less = np.searchsorted(ranked, scores[self._positive], side="left")
        self._no_more = np.searchsorted(ranked, scores[self._positive], side="right")

    def influences(self) -> Floats:
        """Return how much each example moves the area, (n,): by the pairs that it is in, less the area.

        Source: E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, "Comparing the areas under two or more correlated
        receiver operating characteristic curves" (1988).
        """
        positives, negatives = len(self._positive), len(self._negative)
        found = np.empty(positives + negatives)
        above = (self._less + self._no_more) / (2 * negatives)
        # Of each negative, the positives that score more; ties count half.
        pairs = np.bincount(self._less, minlength=negatives + 1) + np.bincount(self._no_more, minlength=negatives + 1)
        below = 1 - np.cumsum(pairs)[:negatives] / (2 * positives)
        area = above.mean()
        found[self._positive] = (above - area) / positives
        found[self._negative] = (below - area) / negatives
        return found

    def area(self, weights: np.ndarray) -> float:
        """Return the area of a resample with example i `weights[i]` times in it; NaN where only one kind occurs."""
        positive = weights[self._positive]
        below = np.zeros(len(self._negative) + 1)
        np.cumsum(weights[self._negative], out=below[1:])
        pairs = positive.sum() * below[-1]
        if pairs == 0:
            return float("nan")
        return float(positive @ (below[self._less] + below[self._no_more]) / (2 * pairs))


def roc_auc_on_draws(answers: Answers) -> Resampler:
    rankings = _rankings(answers)

    def area(weights: Floats) -> float:
        return _mean_of_defined([ranking.area(weights) for ranking in rankings])

    return lambda draws: {"roc_auc": draws.each(area)}


def _rankings(answers: Answers) -> list[_Ranking]:
    ranked = _ranked(np.unique(answers.labels), answers.n_labels)
    return [_Ranking(answers.labels == k, answers.probabilities[:, k]) for k in ranked]


def measure_roc_auc(answers: Answers) -> list[Metric]:
    value = roc_auc(answers.labels, answers.probabilities)
    present = np.unique(answers.labels)
    if value is None:
        only = answers.label_names[present[0]]
        return [Metric("roc_auc", None, None, f"not defined: every example is {only!r}")]
    absent = [name for index, name in enumerate(answers.label_names) if index not in present]
    note = f"without {', '.join(map(repr, absent))}: no such example" if absent else None
    fewest = int(np.bincount(answers.labels)[present].min())
    if fewest < FEWEST_ROWS:
        few = f"no interval: a label has {plural(fewest, 'row')}, expected {FEWEST_ROWS} at least"
        return [Metric("roc_auc", value, None, f"{note}; {few}" if note else few)]
    influences = np.mean([ranking.influences() for ranking in _rankings(answers)], axis=0)
    if not 0 < value < 1:
        why = "no interval: every pair is in the same order"
        return [Metric("roc_auc", value, None, f"{note}; {why}" if note else why)]
    accuracy = float((answers.labels == answers.predictions).mean())
    found = estimated(
        "roc_auc",
        math.log(value / (1 - value)),
        influences / (value * (1 - value)),
        answers.clusters,
        note=note,
        is_rough=bool(are_extreme(accuracy, fewest)),
        is_symmetric=True,
        back=lambda odds: 1 / (1 + math.exp(-odds)),
    )
    return [replace(found, value=value)]


def _mean_of_defined(areas: list[float]) -> float:
    """Return the mean over the labels that occur in the resample, as `roc_auc` does."""
    defined = [area for area in areas if area == area]
    return sum(defined) / len(defined) if defined else float("nan")
