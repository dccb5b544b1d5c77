"""The metrics by name, and the one function that computes them."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from numpy.typing import ArrayLike

from petals_eval.errors import ConfigError
from petals_eval.metrics.accuracy import measure_accuracy, measure_balanced_accuracy, measure_majority_baseline
from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.calibration import measure_ece
from petals_eval.metrics.correlation import measure_mcc
from petals_eval.metrics.fscores import AVERAGES, SCORES, averaged, for_each_label
from petals_eval.metrics.probabilistic import measure_brier, measure_log_loss
from petals_eval.metrics.ranking import measure_roc_auc

__all__ = ["DEFAULT_METRICS", "METRICS", "MetricSpec", "available_metrics", "check_metric_names", "compute_metrics"]


@dataclass(frozen=True)
class MetricSpec:
    """An entry of the table.

    title: as reports print it.
    measure: of answers that hold at least one example; gives one metric, or one a label.
    score: for metrics with one value a label, the name before the bracket.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Answers], list[Metric]]
    higher_is_better: bool = True
    score: str | None = None

    def names(self, label_names: Sequence[str]) -> list[str]:
        """Return the names of the metrics that `measure` gives."""
        return [self.name] if self.score is None else [f"{self.score}[{label}]" for label in label_names]


def _nothing(answers: Answers) -> list[Metric]:
    return []


_TITLES = {"precision": "precision", "recall": "recall", "f1": "F1"}
_SPECS = (
    MetricSpec("accuracy", "accuracy", "share of right answers; brings the majority baseline", measure_accuracy),
    MetricSpec(
        "majority_baseline",
        "majority baseline",
        "accuracy of always answering the commonest label",
        measure_majority_baseline,
    ),
    MetricSpec("balanced_accuracy", "balanced accuracy", "mean recall over the labels", measure_balanced_accuracy),
    *(
        MetricSpec(f"{s}_{a}", f"{_TITLES[s]} ({a})", f"{_TITLES[s]}, {a} average over the labels", averaged(s, a))
        for s in SCORES
        for a in AVERAGES
    ),
    *(
        MetricSpec(
            f"{s}_per_class", _TITLES[s], f"{_TITLES[s]} of each label, as {s}[label]", for_each_label(s), score=s
        )
        for s in SCORES
    ),
    MetricSpec("mcc", "Matthews correlation", "correlation of labels and predictions, -1 to 1", measure_mcc),
    MetricSpec("roc_auc", "ROC AUC", "area under the ROC curve; one against the rest, macro", measure_roc_auc),
    MetricSpec("log_loss", "log loss", "mean -ln p(label), in nats", measure_log_loss, higher_is_better=False),
    MetricSpec("brier", "Brier score", "squared error of the probabilities, 0 to 2", measure_brier, False),
    MetricSpec("ece", "calibration error", "expected calibration error, 15 bins", measure_ece, False),
    # Not a number: it is always in metrics.json under its own key. A task may name it all the same.
    MetricSpec("confusion_matrix", "confusion matrix", "always reported beside the metrics", _nothing),
)

METRICS: Mapping[str, MetricSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
DEFAULT_METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "mcc", "log_loss", "ece")


def available_metrics() -> tuple[str, ...]:
    """Return every name that `compute_metrics` knows, in the order of reports.

    >>> available_metrics()[:3]
    ('accuracy', 'majority_baseline', 'balanced_accuracy')
    """
    return tuple(METRICS)


def check_metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repetitions. Raises ConfigError for one that is unknown, with those that come close."""
    known = tuple(dict.fromkeys(names))
    for name in known:
        if name not in METRICS:
            variants = [other for other in METRICS if other.startswith(f"{name}_")]
            close = variants or difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(METRICS)}."
            raise ConfigError(f"Expected the name of a metric; found {name!r}. {hint}")
    return known


def compute_metrics(
    names: Sequence[str],
    labels: ArrayLike,
    predictions: ArrayLike,
    probabilities: ArrayLike,
    *,
    label_names: Sequence[str],
    seed: int = 0,
) -> dict[str, Metric]:
    """Compute metrics with 95% intervals, by name.

    names: of `available_metrics()`. "accuracy" brings "majority_baseline" with it; "f1_per_class" gives one metric a
        label, "f1[label]"; "confusion_matrix" gives none (see `petals_eval.metrics.confusion_matrix`).
    labels, predictions: (n,) indices into `label_names`. Failed examples are not among them.
    probabilities: (n, labels).
    seed: of the bootstrap; one seed gives one interval, whatever other metrics are asked for.

    Raises ConfigError for an unknown name, DataError for arrays that do not fit.

    >>> found = compute_metrics(["accuracy"], [0, 1], [0, 1], [[0.9, 0.1], [0.2, 0.8]], label_names=["no", "yes"])
    >>> found["accuracy"].value, found["majority_baseline"].value
    (1.0, 0.5)
    """
    known = check_metric_names(names)
    answers = Answers.checked(labels, predictions, probabilities, label_names, seed)
    found: dict[str, Metric] = {}
    for name in known:
        if len(answers) == 0:
            beside = ["majority_baseline"] if name == "accuracy" else []
            silent = name == "confusion_matrix"
            for each in [] if silent else [*METRICS[name].names(label_names), *beside]:
                found[each] = Metric(each, None, None, "no example was scored")
            continue
        for metric in METRICS[name].measure(answers):
            found[metric.name] = _single(metric) if len(answers) == 1 else metric
    return found


def _single(metric: Metric) -> Metric:
    # Every resample of one example is that example: the bootstrap would claim certainty.
    if metric.ci95 is None or metric.name == "accuracy":
        return metric
    note = "no interval from one example"
    return replace(metric, ci95=None, note=f"{metric.note}; {note}" if metric.note else note)
