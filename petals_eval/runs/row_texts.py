"""The texts of a run's rows, which no file of its folder has: read again, and held to what the rows said in the run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_eval.data import DataSource, Rows, load_rows, name_of, rows_of
from petals_eval.errors import ConfigError, DataError, MachineError, TaskError
from petals_eval.runs.manifest import Manifest
from petals_eval.tasks import Task, list_tasks, load_task, resolve_source, task_of_fingerprint
from petals_eval.tasks.requests import RowText
from petals_eval.tasks.row_code import load_row_code
from petals_eval.text import listed, plural, printable

__all__ = ["RowSource", "source_of_run"]

_SHOWN = 3  # rows that say something else
_OF_THE_RUN = ("max_length", "bos", "shots", "separator", "chat", "system", "columns", "asks_without_context")
"""What a run may ask for instead of its task, or what follows from that; no text of a row depends on it."""


@dataclass(frozen=True, eq=False)
class RowSource:
    """Where rows can be read again. rows: with the keys of the run, prepared; a document is a row."""

    task: Task
    rows: Rows

    def texts(self, hashes: Mapping[str, str]) -> dict[str, RowText]:
        """Return what a person reads of rows. hashes: of what they said in the run, by key.

        Raises DataError, with the rows, where one is not there, or says something else. Of a run that noted no hashes
        (schema 1) nothing can be said, and there are no texts.
        """
        read = getattr(self.task, "row_text", None)
        wanted = {key: hashed for key, hashed in hashes.items() if hashed}
        found: dict[str, RowText] = {}
        if read is None or not wanted:
            return found
        for row in self.rows:
            if str(row.index) in wanted:
                found[str(row.index)] = read(self.rows, row)
                if len(found) == len(wanted):
                    break
        missing = [key for key in wanted if key not in found]
        other = [key for key in wanted if key in found and found[key].row_hash != wanted[key]]
        if missing or other:
            shown = [f"{key} is not there" for key in missing]
            shown += [f"{key} says {found[key].text!r:.80}" for key in other]
            raise DataError(
                f"{self.rows.name} does not hold the rows of this run: of {plural(len(wanted), 'row')} looked up "
                f"{len(shown)} differ: {printable(listed(shown, most=_SHOWN))}. Give the data that it "
                "read, with --data, and with --task how it is read."
            )
        return found


def source_of_run(
    manifest: Manifest,
    *,
    task: "str | Path | Mapping[str, Any] | Task | None" = None,
    data: "str | Path | DataSource | Iterable[Mapping[str, object]] | None" = None,
    allow_task_code: bool = False,
    **settings: Any,
) -> tuple[RowSource | None, str]:
    """Return from where the rows of a run are read again, or None and a sentence that says what would do.

    task, data: as `petals_eval.evaluate` takes them; None: a shipped task, or what the manifest says of the task, and
    the task's own data where it is what the run read. settings: of `DataSource`, such as split.

    Raises as `load_task` and `load_rows` do for what was named.
    """
    name = manifest.data.name
    advice = f"texts are not shown: say where {printable(name)}, which this run read, is, with --data"
    try:
        known = _task_of(manifest) if task is None else load_task(task)
    except TaskError:
        if task is not None:
            raise
        return None, f"{advice}, and with --task how it is read"
    try:
        if data is None or isinstance(data, str | Path):
            source = resolve_source(known, data, **settings)
            if data is None and task is None and name_of(source) != name:
                return None, advice
        elif isinstance(data, DataSource):
            source = data
        else:
            return RowSource(known, _prepared(known, rows_of(data), allow_task_code)), ""
        rows = load_rows(source)
    except (ConfigError, DataError, MachineError) as error:
        if data is not None or task is not None:
            raise
        return None, advice if isinstance(error, ConfigError) else f"{advice} ({printable(str(error))})"
    return RowSource(known, _prepared(known, rows, allow_task_code)), ""


def _task_of(manifest: Manifest) -> Task:
    """Return the task that comes with the package, with its data and how files of it are read, where it is that one;
    otherwise what the manifest says of the task. Raises TaskError."""
    shipped = next((each for each in list_tasks() if each.name == manifest.task.get("name")), None)
    if shipped is not None:
        said = shipped.fingerprint()
        if all(manifest.task.get(key) == value for key, value in said.items() if key not in _OF_THE_RUN):
            return shipped
    return task_of_fingerprint(manifest.task)


def _prepared(task: Task, rows: Rows, is_allowed: bool) -> Rows:
    function = getattr(task, "prepare", None)
    if function is not None:
        folder = getattr(task, "_folder", None)
        rows = load_row_code(function, task=task.name, folder=folder, is_allowed=is_allowed).of(rows)
    documents: Rows = getattr(task, "documents", lambda rows: rows)(rows)
    return documents
