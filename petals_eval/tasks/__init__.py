"""Tasks: rows into examples and requests, answers into predictions."""

from petals_eval.tasks.base import Task
from petals_eval.tasks.choice import ChoiceTask
from petals_eval.tasks.classification import ClassificationTask
from petals_eval.tasks.continuation import ContinuationTask
from petals_eval.tasks.generation import GenerationTask
from petals_eval.tasks.group import TaskGroup
from petals_eval.tasks.head_labels import check_head_labels
from petals_eval.tasks.library import (
    list_tasks,
    load_group,
    load_task,
    resolve_source,
    shipped_yaml,
    task_of_fingerprint,
)
from petals_eval.tasks.perplexity import PerplexityTask
from petals_eval.tasks.preview import describe_example, show_example
from petals_eval.tasks.regression import RegressionTask
from petals_eval.tasks.requests import Example, Prediction, Request

__all__ = [
    "ChoiceTask",
    "ClassificationTask",
    "ContinuationTask",
    "Example",
    "GenerationTask",
    "PerplexityTask",
    "Prediction",
    "RegressionTask",
    "Request",
    "Task",
    "TaskGroup",
    "check_head_labels",
    "describe_example",
    "list_tasks",
    "load_group",
    "load_task",
    "resolve_source",
    "shipped_yaml",
    "show_example",
    "task_of_fingerprint",
]
