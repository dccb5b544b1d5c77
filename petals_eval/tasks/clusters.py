"""Clusters of rows that may depend on each other, such as the questions about one text; a column of the data has them.

In the journal a cluster is a number under the column `petals_eval.metrics.scored_rows.CLUSTER`: the same value has the
same number in every run, part and sample, and the number does not say what the value was.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from petals_eval.data.rows import Rows, is_missing
from petals_eval.errors import DataError
from petals_eval.tasks.base import Task
from petals_eval.tasks.labels import spelled
from petals_eval.tasks.requests import Example, Prediction
from petals_eval.validation import shorten

__all__ = ["check_clusters", "cluster_column", "clustered_examples", "with_cluster", "without_cluster"]

_BYTES = 6  # of a SHA-256: as many as a float64 holds as a whole number


def cluster_column(task: Task) -> str | None:
    """Return the column that says of which cluster each row is; None where the task names none."""
    column: str | None = getattr(task, "cluster_column", None)
    return column


def check_clusters(task: Task, rows: Rows) -> None:
    """Raise DataError, which names the row, where the task names clusters and a row does not say of which it is."""
    column = cluster_column(task)
    if column is not None:
        rows.check_columns((column,), task.name)
        for row in rows:
            _number(row.columns[column], rows.where(row), column)


def clustered_examples(task: Task, rows: Rows, tokenizer: Any) -> Iterator[Example]:
    """Yield the examples of a task, each with its cluster. Raises as `Task.examples` does."""
    column = cluster_column(task)
    examples = task.examples(rows, tokenizer)
    if column is None:
        yield from examples
        return
    for example, row in zip(examples, rows, strict=True):
        yield replace(example, cluster=_number(row.columns[column], rows.where(row), column))


def with_cluster(prediction: Prediction, example: Example) -> Prediction:
    """Return the prediction with its example's cluster as the last of its values, if it is of one."""
    if example.cluster is None:
        return prediction
    return replace(prediction, values=tuple((*item, example.cluster) for item in prediction.values))


def without_cluster(prediction: Prediction, task: Task) -> Prediction:
    """Return the prediction as the task made it."""
    own = len(task.columns)
    return replace(prediction, values=tuple(item[:own] for item in prediction.values))


def _number(value: object, where: str, column: str) -> float:
    if is_missing(value) or not isinstance(value, str | int | float) or not spelled(value):
        raise DataError(
            f"{where}: column {column} should say of which cluster the row is, by a text or a number; found "
            f"{shorten(value)}. Rows that depend on no other one need a value of their own there."
        )
    return float(int.from_bytes(hashlib.sha256(spelled(value).encode()).digest()[:_BYTES]))
