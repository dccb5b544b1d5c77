"""`petals-eval report`: a run, or a comparison of several, as a page to look at."""

from pathlib import Path
from typing import Annotated

import typer

from petals_eval.errors import ConfigError

__all__ = ["HELP", "SHORT", "report"]

SHORT = "Make the page of a run, or of a comparison."
HELP = """Make a page that shows a run: estimate and intervals, confusion, calibration, where it is right and wrong, who
computed it, and how to repeat it. It is one file without anything from elsewhere. Of several runs, the page compares
them on their rows.

\b
  petals-eval report runs/sst2
  petals-eval report runs/prompts-a runs/prompts-b --out comparison.html
"""


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. [default: report.html of the run, comparison.html of several]"),
    ] = None,
) -> int:
    typer.echo(f"reading {', '.join(map(str, folders))}", err=True)

    from petals_eval.report.write import write_comparison, write_page, write_pages

    if len(folders) > 1:
        typer.echo(f"report: {write_comparison(folders, out or Path('comparison.html'))}")
    elif (folders[0] / "group.json").is_file():
        if out is not None:
            raise ConfigError("--out: expected one run, for a page is one file; found a group of tasks. Leave it out.")
        for path in write_pages(folders[0]):
            typer.echo(f"report: {path}")
    else:
        typer.echo(f"report: {write_page(folders[0], out)}")
    return 0
