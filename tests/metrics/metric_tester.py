"""The shared tester: cases with their edges, and a reference for every metric that is not our own code."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats
import sklearn.metrics


@dataclass(frozen=True)
class Case:
    name: str
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(f"label-{index}" for index in range(self.probabilities.shape[1]))


def random_case(name: str, n: int, n_labels: int, *, labels: list[int] | None = None, skill: float = 1.0) -> Case:
    random = np.random.default_rng([n, n_labels, round(skill * 10) + 100])
    truth = random.choice(labels if labels is not None else np.arange(n_labels), size=n)
    logits = random.normal(size=(n, n_labels))
    logits[np.arange(n), truth] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Case(name, truth, probabilities.argmax(axis=1), probabilities)


def _fixed(name: str, labels: list[int], probabilities: list[list[float]]) -> Case:
    shares = np.array(probabilities)
    return Case(name, np.array(labels), shares.argmax(axis=1), shares)


_TIES = random_case("tied probabilities", 200, 3)
CASES = (
    random_case("binary", 300, 2),
    random_case("six labels", 500, 6),
    random_case("worse than chance", 200, 3, skill=-1.0),
    random_case("a label that does not occur", 200, 4, labels=[0, 1, 3]),
    random_case("one label only", 50, 3, labels=[2]),
    random_case("one label only, binary", 50, 2, labels=[1]),
    Case(_TIES.name, _TIES.labels, _TIES.predictions, np.round(_TIES.probabilities * 4 + 0.2) / 4 + 0.0),
    _fixed("a label that is never predicted", [0, 0, 1, 2, 2], [[0.8, 0.1, 0.1]] * 3 + [[0.1, 0.2, 0.7]] * 2),
    _fixed("always the same answer", [0, 1, 1, 0], [[0.6, 0.4]] * 4),
    _fixed("one example, right", [1], [[0.3, 0.7]]),
    _fixed("one example, wrong", [0], [[0.3, 0.7]]),
    _fixed("perfect and certain", [0, 1, 2, 1], [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 1.0, 0]]),
    _fixed("wrong and certain", [1, 0, 2, 1], [[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]),
)


def _normal(case: Case) -> Case:
    """Rows that sum to 1 (the tied ones were rounded)."""
    sums = case.probabilities.sum(axis=1, keepdims=True)
    return Case(case.name, case.labels, case.predictions, case.probabilities / sums)


CASES = tuple(map(_normal, CASES))


def _auc_by_rank_sums(case: Case) -> float | None:
    """By Mann and Whitney's U, one label against the rest."""
    present = np.unique(case.labels)
    if len(present) < 2:
        return None
    areas = []
    for label in [1] if case.probabilities.shape[1] == 2 else present:
        inside, outside = (
            case.probabilities[case.labels == label, label],
            case.probabilities[case.labels != label, label],
        )
        areas.append(scipy.stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))
    return float(np.mean(areas))


def _ece_by_loop(case: Case) -> float:
    confidence = case.probabilities.max(axis=1)
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (case.labels == case.predictions)[inside].mean()
            error += inside.mean() * abs(right - confidence[inside].mean())
    return error


def _f(score: str, average: str) -> Callable[[Case], float]:
    function = getattr(sklearn.metrics, f"{score}_score")
    return lambda case: function(case.labels, case.predictions, average=average, zero_division=0)


REFERENCES: dict[str, Callable[[Case], float | None]] = {
    "accuracy": lambda case: sklearn.metrics.accuracy_score(case.labels, case.predictions),
    "majority_baseline": lambda case: scipy.stats.mode(case.labels).count / len(case.labels),
    "balanced_accuracy": lambda case: sklearn.metrics.balanced_accuracy_score(case.labels, case.predictions),
    **{f"{s}_{a}": _f(s, a) for s in ("precision", "recall", "f1") for a in ("macro", "micro", "weighted")},
    "mcc": lambda case: sklearn.metrics.matthews_corrcoef(case.labels, case.predictions),
    "roc_auc": _auc_by_rank_sums,
    "log_loss": lambda case: (
        -np.mean(
            [
                math.log(min(max(row[k], 2**-52), 1 - 2**-52))
                for k, row in zip(case.labels, case.probabilities, strict=True)
            ]
        )
    ),
    "brier": lambda case: np.mean(
        [
            sum((p - (k == j)) ** 2 for j, p in enumerate(row))
            for k, row in zip(case.labels, case.probabilities, strict=True)
        ]
    ),
    "ece": _ece_by_loop,
}


def reference(name: str, case: Case) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = REFERENCES[name](case)
    return None if value is None else float(value)
