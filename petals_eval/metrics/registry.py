"""The metrics by kind of task and by name, and the functions that compute them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from numpy.typing import ArrayLike

from petals_eval.errors import ConfigError
from petals_eval.metrics.accuracy import (
    balanced_accuracy_on_draws,
    measure_accuracy,
    measure_balanced_accuracy,
    measure_majority_baseline,
    right_answers,
)
from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.calibration import measure_ece
from petals_eval.metrics.choices import CHOICE_METRICS
from petals_eval.metrics.correlation import mcc_on_draws, measure_mcc
from petals_eval.metrics.documents import Documents, Unit, measured, on_draws
from petals_eval.metrics.fscores import (
    AVERAGES,
    SCORES,
    averaged,
    averaged_on_draws,
    for_each_label,
    per_class_on_draws,
)
from petals_eval.metrics.generated import GENERATED_METRICS
from petals_eval.metrics.likelihood import CONTINUATION_METRICS
from petals_eval.metrics.probabilistic import brier_terms, log_loss_terms, measure_brier, measure_log_loss
from petals_eval.metrics.ranking import measure_roc_auc, roc_auc_on_draws
from petals_eval.metrics.regression import (
    PASSES,
    Numbers,
    absolute_error_terms,
    measure_mae,
    measure_mse,
    measure_pearson,
    measure_spearman,
    pearson_on_draws,
    spearman_on_draws,
    squared_error_terms,
)
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec, View

__all__ = [
    "DEFAULT_METRICS",
    "KINDS",
    "METRICS",
    "MetricSpec",
    "available_metrics",
    "check_metric_names",
    "compute_metrics",
    "measure",
    "title_of",
]


def _nothing(answers: Answers) -> list[Metric]:
    return []


_TITLES = {"precision": "precision", "recall": "recall", "f1": "F1"}
_CLASSES = (
    MetricSpec(
        "accuracy",
        "accuracy",
        "share of right answers; brings the majority baseline",
        measure_accuracy,
        is_share=True,
        terms=right_answers,
    ),
    MetricSpec(
        "majority_baseline",
        "majority baseline",
        "accuracy of always answering the commonest label",
        measure_majority_baseline,
    ),
    MetricSpec(
        "balanced_accuracy",
        "balanced accuracy",
        "mean recall over the labels",
        measure_balanced_accuracy,
        resampler=balanced_accuracy_on_draws,
    ),
    *(
        MetricSpec(
            f"{s}_{a}",
            f"{_TITLES[s]} ({a})",
            f"{_TITLES[s]}, {a} average over the labels",
            averaged(s, a),
            resampler=averaged_on_draws(s, a),
        )
        for s in SCORES
        for a in AVERAGES
    ),
    *(
        MetricSpec(
            f"{s}_per_class",
            _TITLES[s],
            f"{_TITLES[s]} of each label, as {s}[label]",
            for_each_label(s),
            score=s,
            resampler=per_class_on_draws(s),
        )
        for s in SCORES
    ),
    MetricSpec(
        "mcc",
        "Matthews correlation",
        "correlation of labels and predictions, -1 to 1",
        measure_mcc,
        resampler=mcc_on_draws,
    ),
    MetricSpec(
        "roc_auc",
        "ROC AUC",
        "area under the ROC curve; one against the rest, macro",
        measure_roc_auc,
        resampler=roc_auc_on_draws,
        passes=lambda answers: answers.n_labels,
        needs_scores=True,
    ),
    MetricSpec(
        "log_loss",
        "log loss",
        "mean -ln p(label), in nats",
        measure_log_loss,
        False,
        terms=log_loss_terms,
        needs_scores=True,
    ),
    MetricSpec(
        "brier",
        "Brier score",
        "squared error of the probabilities, 0 to 2",
        measure_brier,
        False,
        terms=brier_terms,
        needs_scores=True,
    ),
    MetricSpec(
        "ece", "calibration error", "expected calibration error, 15 bins", measure_ece, False, needs_scores=True
    ),
    # Not a number: it is always in metrics.json under its own key. A task may name it all the same.
    MetricSpec("confusion_matrix", "confusion matrix", "always reported beside the metrics", _nothing),
)


def _by_unit(name: str, title: str, about: str, unit: Unit, *, in_bits: bool = False) -> MetricSpec:
    return MetricSpec(
        name,
        title,
        about,
        measured(name, unit, in_bits=in_bits),
        higher_is_better=False,
        best=None,
        view=Documents.of,
        resampler=on_draws(name, unit, in_bits=in_bits),
    )


_DOCUMENTS = (
    _by_unit(
        "token_perplexity",
        "token perplexity",
        "e to the power of minus the mean log-likelihood a token",
        "tokens",
    ),
    _by_unit(
        "word_perplexity",
        "word perplexity",
        "the same a word of the original text, whatever the tokenizer",
        "words",
    ),
    _by_unit(
        "byte_perplexity",
        "byte perplexity",
        "the same a byte of the original text in utf-8",
        "bytes",
    ),
    _by_unit(
        "bits_per_byte",
        "bits per byte",
        "minus the mean log-likelihood a byte, in bits",
        "bytes",
        in_bits=True,
    ),
)

_NUMBERS = (
    MetricSpec(
        "pearson",
        "Pearson correlation",
        "of labels and predictions, -1 to 1",
        measure_pearson,
        view=Numbers.of,
        resampler=pearson_on_draws,
        passes=lambda numbers: PASSES,
    ),
    MetricSpec(
        "spearman",
        "Spearman correlation",
        "of their ranks, -1 to 1",
        measure_spearman,
        view=Numbers.of,
        resampler=spearman_on_draws,
        passes=lambda numbers: PASSES,
    ),
    MetricSpec(
        "mse",
        "mean squared error",
        "in squares of the label's unit",
        measure_mse,
        False,
        best=None,
        view=Numbers.of,
        terms=squared_error_terms,
    ),
    MetricSpec(
        "mae",
        "mean absolute error",
        "in the label's unit",
        measure_mae,
        False,
        best=None,
        view=Numbers.of,
        terms=absolute_error_terms,
    ),
)

KINDS: Mapping[str, tuple[MetricSpec, ...]] = MappingProxyType(
    {
        "classification": _CLASSES,
        "regression": _NUMBERS,
        # Of choices that have names the classes' metrics, too: their first column is a score for each.
        "choice": (*CHOICE_METRICS, *_CLASSES),
        "continuation": CONTINUATION_METRICS,
        "perplexity": _DOCUMENTS,
        "generation": GENERATED_METRICS,
    }
)
"""The metrics of each kind of task, in the order of reports. A name has one title, whatever the kind."""

METRICS: Mapping[str, MetricSpec] = MappingProxyType({spec.name: spec for specs in KINDS.values() for spec in specs})
DEFAULT_METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "mcc", "log_loss", "ece")


def available_metrics(kind: str = "classification") -> tuple[str, ...]:
    """Return every metric of a kind of task, in the order of reports. Raises ConfigError for an unknown kind.

    >>> available_metrics()[:3]
    ('accuracy', 'majority_baseline', 'balanced_accuracy')
    """
    return tuple(_table(kind))


def check_metric_names(
    names: Iterable[str], kind: str = "classification", *, label_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the names without repetitions.

    label_names: of the task; None: not known. Raises ConfigError for one that this kind of task does not have, with
    those that come close, and for one that needs labels where there are none.
    """
    table = _table(kind)
    known = tuple(dict.fromkeys(names))
    for name in known:
        if name not in table:
            variants = [other for other in table if other.startswith(f"{name}_")]
            close = variants or difflib.get_close_matches(name, table, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(table)}."
            what = "a metric" if kind == "classification" else f"a metric of {kind}"
            raise ConfigError(f"Expected the name of {what}; found {name!r}. {hint}")
        if table[name].view == Answers.of and label_names is not None and not label_names:
            raise ConfigError(
                f"{name} needs choices that all rows share: give the task label_names, or leave the metric out."
            )
    return known


def title_of(name: str) -> str:
    """Return how reports call a metric, or one label's part of it.

    >>> title_of("f1_macro"), title_of("recall[human]"), title_of("my own")
    ('F1 (macro)', 'recall [human]', 'my own')
    """
    if name in METRICS:
        return METRICS[name].title
    base, bracket, part = name.partition("[")
    if not bracket:
        return name
    titles = (spec.title for spec in METRICS.values() if base in (spec.score, spec.name))
    return f"{next(titles, base)} [{part}"


def compute_metrics(
    names: Sequence[str],
    labels: ArrayLike,
    predictions: ArrayLike,
    probabilities: ArrayLike,
    *,
    label_names: Sequence[str],
) -> dict[str, Metric]:
    """Compute metrics of a classification with 95% intervals, by name.

    names: of `available_metrics()`. "accuracy" brings "majority_baseline" with it; "f1_per_class" gives one metric a
        label, "f1[label]"; "confusion_matrix" gives none (see `petals_eval.metrics.confusion_matrix`).
    labels, predictions: (n,) indices into `label_names`. Failed examples are not among them.
    probabilities: (n, labels).

    Raises ConfigError for an unknown name, DataError for arrays that do not fit.

    >>> found = compute_metrics(["accuracy"], [0, 1], [0, 1], [[0.9, 0.1], [0.2, 0.8]], label_names=["no", "yes"])
    >>> found["accuracy"].value, found["majority_baseline"].value
    (1.0, 0.5)
    """
    known = check_metric_names(names)
    answers = Answers.checked(labels, predictions, probabilities, label_names)
    return _measured([METRICS[name] for name in known], lambda view: answers, label_names, "no example was scored")


def measure(kind: str, names: Sequence[str], rows: ScoredRows, *, label_names: Sequence[str] = ()) -> dict[str, Metric]:
    """Compute the metrics of a task of any kind with 95% intervals, by name, from what a journal holds.

    label_names: where the rows have common labels.
    Raises ConfigError for a name that the kind does not have, DataError for rows that do not fit.
    """
    table, views = _table(kind), dict[View, Any]()

    def view_of(view: View) -> Any:
        if view not in views:
            views[view] = view(rows, label_names)
        return views[view]

    why_none = "no example has a label" if len(rows) else "no example was scored"
    known = check_metric_names(names, kind, label_names=label_names)
    return _measured([table[name] for name in known], view_of, label_names, why_none)


def _table(kind: str) -> dict[str, MetricSpec]:
    if kind not in KINDS:
        raise ConfigError(f"Expected a kind of task: one of {', '.join(KINDS)}; found {kind!r}.")
    return {spec.name: spec for spec in KINDS[kind]}


def _measured(
    specs: Sequence[MetricSpec], view_of: Any, label_names: Sequence[str], why_none: str
) -> dict[str, Metric]:
    """why_none: the note of a metric where there is nothing to compute it from."""
    found: dict[str, Metric] = {}
    for spec in specs:
        given = view_of(spec.view)
        if len(given) == 0:
            beside = ["majority_baseline"] if spec.name == "accuracy" else []
            for name in [] if spec.measure is _nothing else [*spec.names(label_names), *beside]:
                found[name] = Metric(name, None, None, why_none)
            continue
        for metric in spec.measure(given):
            is_single = len(given) == 1 and not spec.is_share and metric.name != "majority_baseline"
            found[metric.name] = _single(metric) if is_single else metric
    return found


def _single(metric: Metric) -> Metric:
    # One example has no spread: its interval would claim certainty.
    if metric.value is None:
        return metric
    notes = [each for each in (metric.note or "").split("; ") if each and not each.startswith("no interval")]
    return replace(metric, ci95=None, is_rough=False, note="; ".join([*notes, "no interval from one example"]))
