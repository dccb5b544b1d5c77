"""The errors of a run, whether it is a folder or a result in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from petals_eval.data import DataSource
from petals_eval.errors import ConfigError
from petals_eval.runs.analyse import analyse, chosen_name
from petals_eval.runs.error_analysis import ErrorAnalysis
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.results import RunResult
from petals_eval.runs.row_texts import source_of_run
from petals_eval.tasks import Task

__all__ = ["errors_of"]


def errors_of(
    run: str | Path | RunResult,
    *,
    adapter: str | None = None,
    limit: int = 5,
    task: str | Path | Mapping[str, Any] | Task | None = None,
    data: str | Path | DataSource | Iterable[Mapping[str, object]] | None = None,
    allow_task_code: bool = False,
    **source_settings: Any,
) -> ErrorAnalysis:
    """Analyse which rows of a run went wrong, how sure the model was of them, and what they have in common.

    run: a run folder, finished or not, or a result of `petals_eval.evaluate`, which knows its data.
    adapter: the name of one, or of one of its draws of shots; None: the first. limit: rows in each list.
    task, data: of a folder, where its texts are read again: no file of a run has them. None: a shipped task's own data
        where the run read these; otherwise there are no texts, and a note says so. source_settings: of `DataSource`.
    allow_task_code: let the task's own function prepare rows where it did not come with this package.

    Only rows that say what they said in the run are shown. Raises DataError, with the rows, where the data are others;
    ConfigError for an unknown adapter, TaskError, RunFolderError, MachineError.
    """
    if limit < 0:
        raise ConfigError(f"limit: expected 0 rows or more, found {limit}.")
    if isinstance(run, RunResult):
        if task is not None or data is not None:
            raise ConfigError("task, data: a result knows its own; they are for a run folder. Leave them out.")
        return run.errors(adapter, limit=limit)
    with RunFolder.open(run) as folder:
        manifest, journal = folder.manifest, folder.journal
        names = [record.name for record in manifest.adapters]
        first_draws: dict[str, str] = {}
        for record in manifest.adapters:
            first_draws.setdefault(record.adapter or record.name, record.name)
        name, notes = chosen_name(adapter, names, first_draws)
        source, advice = source_of_run(
            manifest, task=task, data=data, allow_task_code=allow_task_code, **source_settings
        )
        if manifest.finished is None:
            notes.append("this run is not finished")
        rows = journal.keyed_rows(name, manifest.answer_columns)
        if source is not None and not any(rows.hashes):
            advice = "texts are not shown: this run did not note what its rows say"
        return analyse(
            manifest.kind,
            rows,
            journal.computed_rows(name),
            task=str(manifest.task.get("name", "")),
            adapter=name,
            label_names=folder.names_of("label_names"),
            failed=journal.counts(name).failed,
            limit=limit,
            texts=None if source is None else source.texts,
            written=folder.texts(name),
            notes=[*notes, *([advice] if advice else [])],
        )
