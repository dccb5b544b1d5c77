"""The texts of rows that are compared, which no file of a run has: read again where the runs read them."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from petals_eval.comparison.compare import Comparison
from petals_eval.errors import ConfigError
from petals_eval.runs import RunFolder
from petals_eval.runs.row_texts import source_of_run
from petals_eval.tasks import Task

__all__ = ["texts_of_changed"]


def texts_of_changed(
    comparison: Comparison,
    most: int,
    *,
    task: "str | Path | Mapping[str, Any] | Task | None" = None,
    data: str | Path | None = None,
    allow_task_code: bool = False,
    **source_settings: Any,
) -> dict[str, str]:
    """Return what a person reads of the rows whose prediction changed, by key.

    most: rows of each pair. task, data, allow_task_code, source_settings: as `petals_eval.errors_of` takes them; they
    are about the first run folder among the sides, which says what its rows are.

    Only rows that say what they said in that run are returned. Raises DataError, with the rows, where the data are
    others; ConfigError where no texts can be read, with what would do; TaskError, RunFolderError, MachineError.
    """
    folder = next((Path(each) for each in comparison.sides.values() if Path(each, "manifest.json").is_file()), None)
    if folder is None:
        raise ConfigError("texts: expected a run folder among what is compared, which says what was read; found none.")
    wanted = {row.key for pair in comparison.pairs for row in islice(comparison.changed_rows(*pair), most)}
    with RunFolder.open(folder) as opened:
        manifest = opened.manifest
        rows = opened.journal.keyed_rows(manifest.adapters[0].name, manifest.answer_columns)
    source, advice = source_of_run(manifest, task=task, data=data, allow_task_code=allow_task_code, **source_settings)
    if source is None:
        raise ConfigError(advice)
    if not any(rows.hashes):
        raise ConfigError(f"texts: {folder} did not note what its rows say, so none can be shown. Leave them out.")
    hashes = {key: hashed for key, hashed in zip(rows.keys, rows.hashes, strict=True) if key in wanted}
    return {key: row.text for key, row in source.texts(hashes).items()}
