"""What can be compared: run folders, results in memory, and files of predictions that other tools made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from petals_eval.data.rows import DataSource, Row, Rows, is_missing, load_rows
from petals_eval.errors import ConfigError, DataError, RunFolderError
from petals_eval.metrics import KINDS
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs import WITHOUT_PROMPTS, RunFolder, RunResult
from petals_eval.runs.rows import KeyedRows, packed
from petals_eval.tasks import ClassificationTask, RegressionTask, Task, resolve_source
from petals_eval.tasks.labels import Labels, spelled
from petals_eval.tasks.regression import number_of
from petals_eval.validation import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Compared", "of_folder", "of_predictions", "of_result"]

_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, eq=False)
class Compared:
    """One side as it was found.

    name: of the adapter, or of the file. source: the folder or file. kind, label_names, metrics: of the task.
    draws: its rows, with several draws of shots those of each. fingerprint: of the data; None where it is not known.
    seed: of its bootstrap.
    """

    name: str
    source: str
    kind: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    draws: tuple[KeyedRows, ...]
    fingerprint: str | None = None
    seed: int = 0


def of_folder(path: Path, *, bare_too: bool) -> list[Compared]:
    """Read each adapter of a run folder, finished or not.

    bare_too: also what the run without prompts reached, where there is one. Raises RunFolderError, MachineError.
    """
    with RunFolder.open(path) as folder:
        manifest, journal = folder.manifest, folder.journal
        by_adapter: dict[str, list[KeyedRows]] = {}
        known: KeyedRows | None = None
        for record in manifest.adapters:
            name = record.adapter or record.name
            if name == WITHOUT_PROMPTS and not bare_too:
                continue
            rows = journal.keyed_rows(record.name, manifest.answer_columns)
            # Of twenty adapters the keys are kept once.
            known = known or rows
            if rows.keys == known.keys and rows.hashes == known.hashes:
                rows = replace(rows, keys=known.keys, hashes=known.hashes)
            by_adapter.setdefault(name, []).append(rows)
        empty = next((name for name, draws in by_adapter.items() if not all(map(len, draws))), None)
        if empty is not None:
            raise RunFolderError(f"Expected scored examples of {empty} in {path}; found none. Run it first.")
        return [
            Compared(
                name=name,
                source=str(path),
                kind=manifest.kind,
                label_names=tuple(folder.names_of("label_names")),
                metrics=tuple(folder.names_of("metrics")),
                draws=tuple(draws),
                fingerprint=manifest.data.fingerprint,
                seed=manifest.seeds.get("bootstrap", 0),
            )
            for name, draws in by_adapter.items()
        ]


def of_result(result: RunResult, number: int, *, bare_too: bool) -> list[Compared]:
    """Read a result that holds its predictions, as `petals_eval.evaluate` returns it. Raises ConfigError."""
    found = []
    for adapter in [*result.adapters.values(), *filter(None, [result.without_prompts if bare_too else None])]:
        if not adapter.predictions:
            raise ConfigError(
                "expected results with their predictions, as petals_eval.evaluate returns them; found one without. "
                "Give the path of its run folder instead."
            )
        size = len(adapter.predictions) // max(1, len(adapter.draws))
        parts = [adapter.predictions[start : start + size] for start in range(0, len(adapter.predictions), size)]
        found.append(
            Compared(
                name=adapter.adapter,
                source=f"result {number}",
                kind=result.kind,
                label_names=adapter.label_names,
                metrics=tuple(dict.fromkeys(_listed(name) for name in adapter.metrics)),
                draws=tuple(KeyedRows.of(part, result.columns) for part in parts),
            )
        )
    return found


def of_predictions(path: Path, like: Compared | None, task: Task | None, data: Any) -> Compared:
    """Read a file of predictions that another tool made: csv, tsv, JSONL or Parquet with the columns `key` and
    `prediction`, and `label` unless something else says what is right.

    like: a run beside it; its kind, label names and labels hold for the file, too. task, data: say the same without a
    run, or instead of it; the labels are then those of the task's data, whose keys are positions from 0.
    Without both, the file's own values are the labels of a classification.

    A prediction is a label's name or position, or a number for a regression. Raises DataError, which names the row, and
    ConfigError for a kind whose metrics need more than that.
    """
    rows = load_rows(DataSource(path=str(path)))
    rows.check_columns(("key", "prediction"), "of predictions")
    if task is None and like is None and "label" not in rows.columns:
        raise DataError(
            f"{path.name} does not say what is right: give it a column label, compare it with a run, or name the task "
            "with --task (and --data)."
        )
    kind = task.kind if task is not None else "classification" if like is None else like.kind
    names = task.label_names if task is not None else _names_in(rows) if like is None else like.label_names
    if kind not in ("classification", "regression", "choice"):
        raise ConfigError(
            f"{path.name}: the metrics of a task of kind {kind} need more than predictions. Expected a task of kind "
            "classification, regression or choice."
        )
    labels = {} if like is None else _labels_of(like.draws[0])
    if task is not None and "label" not in rows.columns:
        labels = _labels_of_task(task, data)
    reading = _Reading(rows, kind, names, getattr(task, "label_map", {}))
    keys: list[str] = []
    predicted: list[tuple[float | None, float | None, bytes]] = []
    for row in rows:
        key = spelled(row.columns["key"])
        if "label" in rows.columns:
            label: float | None = reading.value(row, "label")
        elif key in labels:
            label = labels[key]
        else:
            continue  # counted: a row that only this file has
        prediction = reading.value(row, "prediction")
        keys.append(key)
        predicted.append((label, prediction, reading.as_scores(prediction)))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{path.name} has the key {twice!r} twice: expected each row once.")
    if not keys:
        raise DataError(f"{path.name} has no row with a key of {'the task' if like is None else like.source}.")
    specs = KINDS[kind]
    columns = ("log_likelihood",) if kind == "choice" else ("score",)
    return Compared(
        name=path.stem,
        source=str(path),
        kind=kind,
        label_names=tuple(names),
        metrics=tuple(spec.name for spec in specs if not spec.needs_scores),
        draws=(KeyedRows(tuple(keys), ("",) * len(keys), ScoredRows.of(predicted, columns)),),
        seed=0 if like is None else like.seed,
    )


class _Reading:
    """What the values of a file of predictions mean."""

    def __init__(self, rows: Rows, kind: str, names: Sequence[str], label_map: "Mapping[str, str]"):
        self._rows, self._kind = rows, kind
        self._labels = Labels(tuple(names), label_map) if names else None

    def value(self, row: Row, column: str) -> float:
        """Return the position of a label or a choice, or the number. Raises DataError."""
        value, where = row.columns[column], self._rows.where(row)
        if is_missing(value):
            raise DataError(f"{where} has no {column}. Fill it in, or leave the row out.")
        if self._labels is not None:
            index = self._labels.index(value, where=where, column=column)
            return float(index or 0)
        number = number_of(value)
        if number is None or (self._kind == "choice" and (number < 0 or number != int(number))):
            expected = "the position of a choice, from 0" if self._kind == "choice" else "a number"
            raise DataError(f"{where}: {column} is {shorten(value)}. Expected {expected}.")
        return number

    def as_scores(self, prediction: float) -> bytes:
        """Return scores of which that of the prediction is the highest: the journal's values of such a row."""
        if self._kind == "regression":
            return packed(((prediction,),))
        count = len(self._labels.names) if self._labels is not None else int(prediction) + 1
        return packed(tuple((float(index == prediction),) for index in range(count)))


def _names_in(rows: Rows) -> tuple[str, ...]:
    """Return the labels of a file that is alone in saying what there is, in the order of their names."""
    found = {spelled(row.columns[name]) for row in rows for name in ("label", "prediction")}
    return tuple(sorted(found))


def _labels_of(rows: KeyedRows) -> dict[str, float]:
    return dict(zip(rows.keys, rows.rows.labels.tolist(), strict=True))


def _labels_of_task(task: Task, data: Any) -> dict[str, float]:
    if not isinstance(task, ClassificationTask | RegressionTask):
        raise ConfigError(
            f"expected a column label in the predictions: of a task of kind {task.kind} the rows do not say it alone."
        )
    rows = load_rows(resolve_source(task, data))
    task.check(rows)
    return {key: np.nan if label is None else float(label) for key, label in task.row_labels(rows)}


def _listed(metric: str) -> str:
    """Return what a task lists for a metric of a result: "recall_per_class" for "recall[human]"."""
    base, bracket, _ = metric.partition("[")
    of_labels = {spec.score for specs in KINDS.values() for spec in specs}
    return f"{base}_per_class" if bracket and base in of_labels else base
