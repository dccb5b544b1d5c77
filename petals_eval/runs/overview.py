"""Many runs in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from petals_eval.errors import RunFolderError
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.tables import ResultRow

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["load_runs", "rows_of_folders"]


def load_runs(folder: str | Path) -> "DataFrame":
    """Return every run below a folder as a pandas DataFrame: a row for each adapter of each.

    Columns: run (its path below the folder), task, kind, model, adapter, data, created, finished (None for one that is
    not), rows, failed, unsure_share (the share of predictions that rounding may turn; None where nobody knows), and of
    each metric its value and, as `<metric>_low` and `<metric>_high`, its 95% interval.
    Raises RunFolderError where there is no run, MachineError.
    """
    from pandas import DataFrame

    root = Path(folder)
    found = sorted(path.parent for path in root.rglob("manifest.json"))
    if not found:
        raise RunFolderError(f"Expected the folders of runs below {root}; found none.")
    records = []
    for said, metrics in rows_of_folders(found):
        record = {**said, "run": Path(str(said["run"])).relative_to(root).as_posix()}
        for name, metric in metrics.items():
            low, high = metric.ci95 or (None, None)
            record |= {name: metric.value, f"{name}_low": low, f"{name}_high": high}
        records.append(record)
    return DataFrame(records)


def rows_of_folders(folders: Sequence[Path]) -> list[ResultRow]:
    """Return a row for each adapter of these run folders, computed anew from their journals.

    Raises RunFolderError, MachineError.
    """
    rows: list[ResultRow] = []
    for path in folders:
        with RunFolder.open(path) as folder:
            result, manifest = folder.result(), folder.manifest
        about = {"model": manifest.model.name, "data": manifest.data.name}
        times = {"created": manifest.created, "finished": manifest.finished}
        rows += [({**said, **about, **times}, metrics) for said, metrics in result.rows(run=str(path))]
    return rows
