"""Precision, recall and F1, averaged over labels or for each label."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.errors import ConfigError
from petals_eval.metrics.accuracy import right_answers
from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.estimates import counted, ratio_of, share_of
from petals_eval.metrics.intervals import Tallies, wilson
from petals_eval.metrics.resampling import Resampler

__all__ = ["AVERAGES", "SCORES", "per_class", "precision_recall_f1", "resampled_average", "resampled_per_class"]

SCORES = ("precision", "recall", "f1")
AVERAGES = ("macro", "micro", "weighted")
FEW_OF_LABEL = 2  # right or wrong rows of a label
# Of each label, for an interval that covers: a label that occurs seldom or never moves these in jumps.
FEWEST_ROWS = {("precision", "macro"): 6, ("recall", "macro"): 5, ("f1", "macro"): 6, ("precision", "weighted"): 60}


def precision_recall_f1(labels: ArrayLike, predictions: ArrayLike, average: str) -> tuple[float, float, float]:
    """Return (precision, recall, F1), averaged as scikit-learn does by default.

    average: "macro" (mean over labels), "micro" (over examples: each equals accuracy where every example has one label)
        or "weighted" (mean over labels by their frequency); "binary" is that of label 1 alone, of labels 0 and 1.

    Averages run over the labels that occur or are predicted; among them 0/0 counts as 0. Raises ConfigError for another
    average.

    >>> [round(score, 4) for score in precision_recall_f1([0, 1, 2, 2], [0, 1, 1, 2], "macro")]
    [0.8333, 0.8333, 0.7778]
    >>> precision_recall_f1([0, 1, 1], [0, 0, 1], "binary")[1]
    0.5
    """
    if average == "binary":
        positive = (float(np.nan_to_num(scores[1])) for scores in per_class(labels, predictions, 2))
        return next(positive), next(positive), next(positive)
    if average not in AVERAGES:
        raise ConfigError(f"average: expected one of {', '.join(AVERAGES)} or binary; found {average!r}.")
    tallies = Tallies.of(labels, predictions)
    precision, recall, f1 = (float(resampled_average(score, average, tallies)[0]) for score in SCORES)
    return precision, recall, f1


def per_class(labels: ArrayLike, predictions: ArrayLike, n_labels: int) -> tuple[list[float], list[float], list[float]]:
    """Return (precision, recall, F1), each a list (labels,) with NaN for 0/0: never predicted or never occurring.

    >>> per_class([0, 0, 1], [0, 0, 0], 2)
    ([0.6666666666666666, nan], [1.0, 0.0], [0.8, 0.0])
    """
    tallies = Tallies.of(labels, predictions, n_labels)
    precision, recall, f1 = (resampled_per_class(score, tallies)[0].tolist() for score in SCORES)
    return precision, recall, f1


def resampled_per_class(score: str, tallies: Tallies) -> np.ndarray:
    """Return (resamples, labels) of "precision", "recall" or "f1", NaN for 0/0."""
    above = 2 * tallies.right if score == "f1" else tallies.right
    below = {
        "precision": tallies.predicted,
        "recall": tallies.labelled,
        "f1": tallies.predicted + tallies.labelled,
    }[score]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def resampled_average(score: str, average: str, tallies: Tallies) -> np.ndarray:
    """Return (resamples,) of "precision", "recall" or "f1" under an average."""
    if average == "micro":
        return tallies.right.sum(axis=1) / tallies.total
    scores = np.nan_to_num(resampled_per_class(score, tallies), nan=0.0)
    if average == "weighted":
        return (scores * tallies.labelled).sum(axis=1) / tallies.total
    seen = (tallies.predicted + tallies.labelled) > 0
    return (scores * seen).sum(axis=1) / seen.sum(axis=1)


def averaged_on_draws(score: str, average: str) -> Callable[[Answers], Resampler]:
    """Return the resampler of `f1_macro` and its like."""
    name = f"{score}_{average}"
    return lambda answers: lambda draws: {name: resampled_average(score, average, answers.tallies(draws))}


def per_class_on_draws(score: str) -> Callable[[Answers], Resampler]:
    """Return the resampler of `f1_per_class` and its like."""

    def resampler(answers: Answers) -> Resampler:
        names = [f"{score}[{label}]" for label in answers.label_names]
        return lambda draws: dict(zip(names, resampled_per_class(score, answers.tallies(draws)).T, strict=True))

    return resampler


def averaged(score: str, average: str) -> Callable[[Answers], list[Metric]]:
    """Return the measurement of `f1_macro` and its like."""

    def measure(answers: Answers) -> list[Metric]:
        if average == "micro" or (score, average) == ("recall", "weighted"):  # each is the accuracy
            [right] = right_answers(answers).values()
            return [share_of(f"{score}_{average}", right, answers.clusters)]
        value = precision_recall_f1(answers.labels, answers.predictions, average)[SCORES.index(score)]
        fewest = FEWEST_ROWS.get((score, average), 0)
        return [
            counted(f"{score}_{average}", value, answers, partial(resampled_average, score, average), fewest=fewest)
        ]

    return measure


def for_each_label(score: str) -> Callable[[Answers], list[Metric]]:
    """Return the measurement of `f1_per_class` and its like: one metric a label, named `f1[label]`."""
    why = {"precision": "never predicted", "recall": "no such example", "f1": "no such example, never predicted"}[score]

    def measure(answers: Answers) -> list[Metric]:
        scores = per_class(answers.labels, answers.predictions, answers.n_labels)[SCORES.index(score)]
        return [
            Metric(f"{score}[{name}]", None, None, why)
            if np.isnan(value)
            else _of_label(score, f"{score}[{name}]", answers, index)
            for index, (name, value) in enumerate(zip(answers.label_names, scores, strict=True))
        ]

    return measure


def _of_label(score: str, name: str, answers: Answers, label: int) -> Metric:
    """Return a score of one label with Wilson's interval of the share that it is, or that it follows from.

    F1 is 2 s / (1 + s) of the share s of right ones among all rows that have the label or were given it.
    """
    is_label, is_predicted = answers.labels == label, answers.predictions == label
    among = {"precision": is_predicted, "recall": is_label, "f1": is_label | is_predicted}[score]
    back: Callable[[float], float] = (lambda share: 2 * share / (1 + share)) if score == "f1" else float
    right = (is_label & is_predicted).astype(np.float64)
    if answers.clusters is not None:
        # Only the clusters that hold one of these rows say anything of the label.
        numbers = np.unique(answers.clusters[among], return_inverse=True)[1].reshape(-1)
        return ratio_of(name, right[among], np.ones(int(among.sum())), numbers, limits=(0.0, 1.0), back=back)
    count, total = int(right.sum()), int(among.sum())
    low, high = wilson(count, total)
    is_rough = min(count, total - count) < FEW_OF_LABEL
    return Metric(name, back(count / total), (back(low), back(high)), is_rough=is_rough)
