"""The texts of a run of the demo, whose data came with the package."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from petals_eval.config import TextSettings

__all__ = ["text_arguments"]


def text_arguments(folders: Iterable[Path | str], settings: TextSettings) -> dict[str, Any]:
    """Return where the texts of runs are: as the settings say, or with the demo's task where the first is its run."""
    said = settings.as_arguments
    folder = next((Path(each) for each in folders if Path(each, "manifest.json").is_file()), None)
    if said["task"] is None and said["data"] is None and folder is not None:
        said["task"] = _task_of_the_demo(folder)
    return said


def _task_of_the_demo(folder: Path) -> Path | None:
    from petals_eval.data import DataSource, load_rows
    from petals_eval.demo import demo_paths
    from petals_eval.runs import RunFolder

    paths = demo_paths()
    with RunFolder.open(folder) as opened:
        read = opened.manifest.data
    if read.name != paths.data.name or read.fingerprint != load_rows(DataSource(path=str(paths.data))).fingerprint:
        return None
    return paths.task
