"""Pages written where they belong: beside what they show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petals_eval.report.page import page
from petals_eval.runs import GroupResult, RunFolder
from petals_eval.runs.disk import write_atomically
from petals_eval.tasks.group import folder_name

__all__ = ["COMPARISON", "PAGE", "write_comparison", "write_page", "write_pages"]

PAGE = "report.html"
"""The name of a run's page in its folder."""

COMPARISON = "comparison.html"
"""The name of a page that compares runs."""


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


def write_comparison(folders: Sequence[Path], out: Path, *, texts: Mapping[str, Any] | None = None) -> Path:
    """Write the page that compares runs and return its path.

    texts: where those of changed rows are, as `texts_of_changed` takes it; None: none are shown. Raises as
    `petals_eval.compare` and `texts_of_changed` do.
    """
    from petals_eval.comparison.compare import compare
    from petals_eval.comparison.row_texts import texts_of_changed
    from petals_eval.report.comparison_page import MOST_CHANGED, comparison_page

    comparison = compare(*folders)
    found = None if texts is None else texts_of_changed(comparison, MOST_CHANGED, **texts)
    write_atomically(out, [comparison_page(comparison, texts=found)])
    return out
