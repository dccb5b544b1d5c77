"""`petals-eval show`: the result of a run folder, computed anew from what its journal holds."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.flags import flags_of
from petals_eval.config import ResultSettings
from petals_eval.errors import ConfigError
from petals_eval.text import plural

__all__ = ["HELP", "SHORT", "show"]

SHORT = "Show the result of a run folder."
HELP = """Show the result of a run folder, computed anew from its journal: of a run that is finished, was
interrupted or is under way, of a group of tasks, and of folders that earlier versions wrote. The bars that the run was
given are held against it again, unless others are given here. Several folders are shown as one table. Nothing is
written.

\b
  petals-eval show runs/sst2
  petals-eval show runs/sst2 --json
  petals-eval show runs/prompts-a runs/prompts-b --latex
"""


@flags_of(ResultSettings)
def show(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders.")],
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX tabular (booktabs).")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a csv.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    model_card: Annotated[
        bool, typer.Option("--model-card", help="Print the metadata of a model card with the hub's model-index.")
    ] = False,
    **flags: Any,
) -> int:
    typer.echo(f"reading {', '.join(str(folder) for folder in folders)}", err=True)
    forms = (("latex", latex), ("csv", csv), ("markdown", markdown), ("model-card", model_card))
    chosen = [name for name, given in forms if given]
    if len(chosen) > 1 or (chosen and flags):
        raise ConfigError(f"expected --{chosen[0]} alone: it prints one thing and nothing else")
    if model_card:
        from petals_eval.report.model_card import model_card_data

        if len(folders) > 1:
            raise ConfigError("--model-card: expected one run folder, found several")
        typer.echo(f"---\n{model_card_data(folders[0])}\n---")
        return 0
    if not chosen and len(folders) > 1 and flags:
        raise ConfigError("expected one run folder beside these flags; several are shown as a table")
    if chosen:
        from petals_eval.runs import tables
        from petals_eval.runs.overview import rows_of_folders

        typer.echo(getattr(tables, f"as_{chosen[0]}")(rows_of_folders(folders)), nl=False)
        return 0
    return _show_runs(folders) if len(folders) > 1 else _show_run(folders[0], flags)


def _show_runs(folders: Sequence[Path]) -> int:
    from petals_eval.report import console_for
    from petals_eval.report.tables import fitting_table
    from petals_eval.runs.overview import rows_of_folders
    from petals_eval.runs.tables import result_cells

    # Metrics below each other: of these there are more than of runs.
    heads, *rows = zip(*result_cells(rows_of_folders(folders)), strict=True)
    console = console_for(sys.stdout)
    for line in fitting_table(heads, rows, console.width):
        console.print(line, soft_wrap=True)
    return 0


def _show_run(folder: Path, flags: dict[str, Any]) -> int:
    from petals_eval.cli.evaluation import show_result
    from petals_eval.runs import RunFolder
    from petals_eval.runs.thresholds import check_parts, parse_thresholds

    if (folder / "group.json").is_file():
        return _show_group(folder, flags)
    with RunFolder.open(folder) as opened:
        settings = ResultSettings(**{**opened.manifest.bars, **flags})
        labels, kind = opened.names_of("label_names"), opened.manifest.kind
        thresholds = parse_thresholds(settings.fail_under, settings.fail_over, labels, kind=kind)
        check_parts(thresholds, opened.manifest.answer_columns)
        result = opened.result()
    if opened.manifest.finished is None:
        every = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
        scored = sum(each.n_scored for each in every)
        typer.echo(f"note: this run is not finished; {plural(scored, 'example is', 'examples are')} scored", err=True)
    return show_result(result, folder, thresholds, settings)


def _show_group(folder: Path, flags: dict[str, Any]) -> int:
    from petals_eval.cli.evaluation import show_group
    from petals_eval.runs import GroupResult, RunFolder
    from petals_eval.runs.thresholds import check_parts, parse_thresholds
    from petals_eval.tasks.group import folder_name

    result = GroupResult.of_folder(folder)
    thresholds, settings = {}, ResultSettings(**flags)
    for name, each in result.tasks.items():
        with RunFolder.open(folder / folder_name(name)) as opened:
            # All tasks of a group have the same bars.
            settings = ResultSettings(**{**opened.manifest.bars, **flags})
            found = parse_thresholds(settings.fail_under, settings.fail_over, each.first.label_names, kind=each.kind)
            check_parts(found, opened.manifest.answer_columns)
        thresholds[name] = found
    return show_group(result, folder, thresholds, settings)
