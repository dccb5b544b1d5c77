"""`petals-eval errors`: which rows of a run went wrong, and what they have in common."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.demo_texts import text_arguments
from petals_eval.cli.flags import flags_of
from petals_eval.cli.streams import json_text
from petals_eval.config import ErrorSettings

__all__ = ["HELP", "SHORT", "errors"]

SHORT = "Show which rows of a run went wrong."
HELP = """Show which rows of a run went wrong: what stands out, which label was taken for which, the errors by label, by
length and by server, and the rows that were the most confident, the worst and the closest, with their texts.

\b
  petals-eval errors runs/sst2
  petals-eval errors runs/reviews --data reviews.jsonl
  petals-eval errors runs/reviews --task ./reviews.yaml --limit 20 --json

No file of a run folder holds texts: they are read again from the data, and a row that says something else than in the
run is refused. Nothing is written.
"""


@flags_of(ErrorSettings)
def errors(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Run folder.")], **flags: Any) -> int:
    typer.echo(f"reading {folder}", err=True)

    from petals_eval.report import console_for, print_errors
    from petals_eval.runs.analysed_runs import errors_of

    settings = ErrorSettings(**flags)
    found = errors_of(folder, adapter=settings.adapter, limit=settings.limit, **text_arguments([folder], settings))
    if settings.json_output:
        typer.echo(json_text(found.to_json(), indent=2))
    else:
        print_errors(found, console_for(sys.stdout))
    return 0
