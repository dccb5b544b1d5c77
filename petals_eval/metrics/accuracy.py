"""Accuracy, balanced accuracy and the majority-class baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.estimates import counted, share_of
from petals_eval.metrics.intervals import Floats, Tallies, paired, wilson
from petals_eval.metrics.resampling import Resampler

__all__ = ["accuracy", "balanced_accuracy", "majority_baseline", "with_order_doubted"]

_NAMES_SHOWN = 8  # of labels in another order; more would fill the line


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the share of predictions that are right, in [0, 1]. Raises DataError for arrays that do not fit.

    >>> accuracy([0, 1, 2, 2], [0, 1, 1, 2])
    0.75
    """
    truth, predicted = paired(labels, predictions)
    return float(np.mean(truth == predicted))


def balanced_accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the mean recall over the labels that occur among `labels`, in [0, 1] (not adjusted for chance).

    >>> balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0])
    0.5
    """
    return float(balanced_accuracies(Tallies.of(labels, predictions))[0])


def majority_baseline(labels: ArrayLike) -> float:
    """Return the accuracy of always answering the most frequent of these labels: what a model must beat.

    >>> majority_baseline([0, 1, 1, 1])
    0.75
    """
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return float(counts.max() / counts.sum())


def balanced_accuracies(tallies: Tallies) -> np.ndarray:
    """Return (resamples,) balanced accuracies from tallies."""
    occurs = tallies.labelled > 0
    recall = np.divide(tallies.right, tallies.labelled, out=np.zeros_like(tallies.right), where=occurs)
    return recall.sum(axis=1) / occurs.sum(axis=1)


def balanced_accuracy_on_draws(answers: Answers) -> Resampler:
    return lambda draws: {"balanced_accuracy": balanced_accuracies(answers.tallies(draws))}


def right_answers(answers: Answers) -> dict[str, Floats]:
    return {"accuracy": (answers.labels == answers.predictions).astype(np.float64)}


def measure_accuracy(answers: Answers) -> list[Metric]:
    [right] = right_answers(answers).values()
    return [share_of("accuracy", right, answers.clusters), *measure_majority_baseline(answers)]


def measure_majority_baseline(answers: Answers) -> list[Metric]:
    # No interval: it is a property of the examples, not of the model.
    most = answers.label_names[int(np.bincount(answers.labels).argmax())]
    return [Metric("majority_baseline", majority_baseline(answers.labels), None, f"always answering {most!r}")]


def measure_balanced_accuracy(answers: Answers) -> list[Metric]:
    value = balanced_accuracy(answers.labels, answers.predictions)
    return [counted("balanced_accuracy", value, answers, balanced_accuracies)]


def with_order_doubted(
    metrics: Mapping[str, Metric], confusion: Sequence[Sequence[int]], label_names: Sequence[str]
) -> dict[str, Metric]:
    """Return the metrics of a trained head, with a note at the accuracy where the labels' names are likely to stand in
    another order than the head's outputs.

    That is where the whole interval of the accuracy lies below the majority baseline, and with the names in another
    order the interval of the accuracy would lie above both that and one half. Chance alone, which the best of all
    orders of many labels has much of, does not reach so far.

    confusion: counts (labels, labels), row = label, column = prediction.
    """
    found, baseline = metrics.get("accuracy"), metrics.get("majority_baseline")
    if found is None or found.ci95 is None or baseline is None or baseline.value is None:
        return dict(metrics)
    if found.ci95[1] >= baseline.value:
        return dict(metrics)
    from scipy.optimize import linear_sum_assignment  # not above: it takes long to import, and is seldom needed

    counts = np.asarray(confusion)
    outputs, labels = linear_sum_assignment(counts.T, maximize=True)
    right, total = int(counts.T[outputs, labels].sum()), int(counts.sum())
    if wilson(right, total)[0] <= max(baseline.value, 0.5):
        return dict(metrics)
    order = "the labels exchanged"
    if len(label_names) > 2:
        order = "the labels in another order"
        if len(label_names) <= _NAMES_SHOWN:
            order = f"label_names [{', '.join(label_names[label] for label in labels)}]"
    doubt = (
        f"below the majority baseline; with {order} it would be {right / total:.4f}. Is label_names in the order of "
        f"the head's outputs (output 0 = {label_names[0]!r})?"
    )
    note = doubt if found.note is None else f"{doubt} {found.note}"
    return {**metrics, "accuracy": replace(found, note=note)}
