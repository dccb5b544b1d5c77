"""`petals-eval report`: a run, or a comparison of several, as a page to look at."""

from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.demo_texts import text_arguments
from petals_eval.cli.flags import flags_of
from petals_eval.config import TextSettings
from petals_eval.errors import ConfigError

__all__ = ["HELP", "SHORT", "report"]

SHORT = "Make the page of a run, or of a comparison."
HELP = """Make a page that shows a run: estimate and intervals, confusion, calibration, where it is right and wrong, who
computed it, and how to repeat it. It is one file without anything from elsewhere. Of several runs, the page compares
them on their rows; with --with-texts it also holds the texts of rows whose prediction changed, and can no longer be
shared where the data cannot.

\b
  petals-eval report runs/sst2
  petals-eval report runs/prompts-a runs/prompts-b --out comparison.html
  petals-eval report runs/prompts-a runs/prompts-b --with-texts --data reviews.jsonl
"""


@flags_of(TextSettings)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. [default: report.html of the run, comparison.html of several]"),
    ] = None,
    with_texts: Annotated[
        bool, typer.Option("--with-texts", help="Of several runs: show the texts of rows whose prediction changed.")
    ] = False,
    **flags: Any,
) -> int:
    typer.echo(f"reading {', '.join(map(str, folders))}", err=True)

    from petals_eval.report.write import COMPARISON, PAGE, write_comparison, write_page, write_pages

    if with_texts and len(folders) == 1:
        raise ConfigError("--with-texts: expected several runs, for the page of one holds no texts; found one.")
    if flags and not with_texts:
        raise ConfigError("expected --with-texts beside --data, --task and the other flags that say where texts are")
    if out is not None:
        _check_out(out, PAGE if len(folders) == 1 else COMPARISON)
    if len(folders) > 1:
        texts = text_arguments(folders, TextSettings(**flags)) if with_texts else None
        typer.echo(f"report: {write_comparison(folders, out or Path(COMPARISON), texts=texts)}")
    elif (folders[0] / "group.json").is_file():
        if out is not None:
            raise ConfigError("--out: expected one run, for a page is one file; found a group of tasks. Leave it out.")
        for path in write_pages(folders[0]):
            typer.echo(f"report: {path}")
    else:
        typer.echo(f"report: {write_page(folders[0], out)}")
    return 0


def _check_out(out: Path, usual: str) -> None:
    """Raise ConfigError where no page can be written to `out`. usual: the name of such a page."""
    if out.is_dir():
        raise ConfigError(
            f"--out: expected the name of an HTML file; {out} is a folder. Write for example --out {out / usual}"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}: make it, or name another file.")
