"""Metrics of a classification run: pure functions on arrays, by scikit-learn, with 95% intervals."""

from petals_eval.metrics.accuracy import accuracy, balanced_accuracy, majority_baseline
from petals_eval.metrics.answers import Metric
from petals_eval.metrics.calibration import ece
from petals_eval.metrics.confusion import confusion_matrix
from petals_eval.metrics.correlation import mcc
from petals_eval.metrics.fscores import per_class, precision_recall_f1
from petals_eval.metrics.intervals import wilson
from petals_eval.metrics.probabilistic import brier, log_loss
from petals_eval.metrics.ranking import roc_auc
from petals_eval.metrics.registry import (
    DEFAULT_METRICS,
    METRICS,
    MetricSpec,
    available_metrics,
    check_metric_names,
    compute_metrics,
)

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Metric",
    "MetricSpec",
    "accuracy",
    "available_metrics",
    "balanced_accuracy",
    "brier",
    "check_metric_names",
    "compute_metrics",
    "confusion_matrix",
    "ece",
    "log_loss",
    "majority_baseline",
    "mcc",
    "per_class",
    "precision_recall_f1",
    "roc_auc",
    "wilson",
]
