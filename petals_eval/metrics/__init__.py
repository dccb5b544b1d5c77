"""Metrics of every kind of task: pure functions on arrays with the values of scikit-learn, and 95% intervals."""

from petals_eval.metrics.accuracy import accuracy, balanced_accuracy, majority_baseline, with_order_doubted
from petals_eval.metrics.answers import Metric, Spread
from petals_eval.metrics.calibration import ece
from petals_eval.metrics.confusion import confusion_matrix
from petals_eval.metrics.correlation import mcc
from petals_eval.metrics.fscores import per_class, precision_recall_f1
from petals_eval.metrics.intervals import wilson
from petals_eval.metrics.probabilistic import brier, log_loss
from petals_eval.metrics.ranking import roc_auc
from petals_eval.metrics.registry import (
    DEFAULT_METRICS,
    KINDS,
    METRICS,
    available_metrics,
    check_metric_names,
    compute_metrics,
    measure,
    title_of,
)
from petals_eval.metrics.regression import mae, mse, pearson, spearman
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec

__all__ = [
    "DEFAULT_METRICS",
    "KINDS",
    "METRICS",
    "Metric",
    "MetricSpec",
    "ScoredRows",
    "Spread",
    "accuracy",
    "available_metrics",
    "balanced_accuracy",
    "brier",
    "check_metric_names",
    "compute_metrics",
    "confusion_matrix",
    "ece",
    "log_loss",
    "mae",
    "majority_baseline",
    "mcc",
    "measure",
    "mse",
    "pearson",
    "per_class",
    "precision_recall_f1",
    "roc_auc",
    "spearman",
    "title_of",
    "wilson",
    "with_order_doubted",
]
