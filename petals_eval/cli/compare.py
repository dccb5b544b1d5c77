"""`petals-eval compare`: which of several runs is better, on the same rows."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_eval.cli.demo_texts import text_arguments
from petals_eval.cli.flags import flags_of
from petals_eval.cli.streams import json_text
from petals_eval.comparison.settings import CompareSettings
from petals_eval.config import TextSettings
from petals_eval.errors import ConfigError

if TYPE_CHECKING:
    from petals_eval.comparison.compare import Comparison

__all__ = ["HELP", "SHORT", "compare"]

SHORT = "Compare runs on the same rows."
HELP = """Compare runs, or the adapters of one, on the rows that all of them scored: the difference of every metric (the
first run minus the second) with its 95% interval, a test, and the smallest difference that so many rows could show.

\b
  petals-eval compare runs/prompts-a runs/prompts-b
  petals-eval compare runs/prompts-a runs/prompts-b --latex
  petals-eval compare old=runs/prompts-a new=runs/prompts-b
  petals-eval compare runs/several-adapters --against baseline
  petals-eval compare runs/prompts-a other-tool.csv

A file holds the predictions of another tool: csv, tsv or JSONL with the columns key (the position of the row in the
data, from 0), prediction, and label unless a run or --task says what is right.
"""


@flags_of(CompareSettings)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN...",
            help="Run folders, and files of predictions, each with a name to show if you give one.",
        ),
    ],
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX tabular (booktabs).")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a csv.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    **flags: Any,
) -> int:
    typer.echo(f"comparing {', '.join(runs)}", err=True)

    from petals_eval.comparison.compare import compare as compare_runs
    from petals_eval.report import console_for, print_comparison

    settings = CompareSettings(**flags)
    forms = (("latex", latex), ("csv", csv), ("markdown", markdown))
    chosen = [name for name, given in forms if given]
    if chosen and (len(chosen) > 1 or settings.json_output or settings.with_texts):
        raise ConfigError(f"expected --{chosen[0]} without --json, --with-texts or another table: it prints one thing")
    found = compare_runs(
        *runs,
        metrics=settings.metrics,
        against=settings.against,
        task=settings.task,
        data=settings.data,
        seed=settings.seed,
    )
    if chosen:
        typer.echo(getattr(found, f"to_{chosen[0]}")(), nl=False)
        return 0
    texts = _texts(found, settings) if settings.with_texts else None
    if settings.json_output:
        report = found.to_json(changed_rows=settings.changed, texts=texts)
        typer.echo(json_text(report, indent=2))
    else:
        print_comparison(found, console_for(sys.stdout), changed_rows=settings.changed, texts=texts)
    return 0


def _texts(found: "Comparison", settings: CompareSettings) -> dict[str, str]:
    from petals_eval.comparison.row_texts import texts_of_changed

    where = TextSettings(task=settings.task, data=settings.data)
    return texts_of_changed(found, settings.changed, **text_arguments(found.sides.values(), where))
