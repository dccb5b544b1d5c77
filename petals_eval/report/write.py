"""Pages written where they belong: beside what they show."""

from collections.abc import Sequence
from pathlib import Path

from petals_eval.report.page import page
from petals_eval.runs import GroupResult, RunFolder
from petals_eval.runs.disk import write_atomically
from petals_eval.tasks.group import folder_name

__all__ = ["PAGE", "write_comparison", "write_page", "write_pages"]

PAGE = "report.html"
"""The name of a run's page in its folder."""


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run and return its path. out: None: in the run's folder.

    Raises RunFolderError, MachineError.
    """
    place = folder / PAGE if out is None else out
    with RunFolder.open(folder) as opened:
        text = page(opened)
    write_atomically(place, [text])
    return place


def write_pages(folder: Path) -> list[Path]:
    """Write the page of each task of a group and return their paths. Raises RunFolderError, MachineError."""
    return [write_page(folder / folder_name(name)) for name in GroupResult.of_folder(folder).tasks]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares runs and return its path. Raises as `petals_eval.compare` does."""
    from petals_eval.comparison.compare import compare
    from petals_eval.report.comparison_page import comparison_page

    write_atomically(out, [comparison_page(compare(*folders))])
    return out
