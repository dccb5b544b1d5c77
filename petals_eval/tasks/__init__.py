"""Tasks: rows into examples and requests, answers into predictions."""

from petals_eval.tasks.base import Task
from petals_eval.tasks.classification import ClassificationTask
from petals_eval.tasks.head_labels import check_head_labels
from petals_eval.tasks.library import list_tasks, load_task, resolve_source
from petals_eval.tasks.preview import describe_example, show_example
from petals_eval.tasks.regression import RegressionTask
from petals_eval.tasks.requests import Example, Prediction, Request

__all__ = [
    "ClassificationTask",
    "Example",
    "Prediction",
    "RegressionTask",
    "Request",
    "Task",
    "check_head_labels",
    "describe_example",
    "list_tasks",
    "load_task",
    "resolve_source",
    "show_example",
]
