"""`petals-eval merge`: join the parts of a run that were evaluated apart."""

from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.flags import flags_of
from petals_eval.config import ResultSettings
from petals_eval.text import plural

__all__ = ["HELP", "SHORT", "merge"]

SHORT = "Join the parts of a run (--shard) into one."
HELP = """Join the run folders of all parts of a run into one, and compute its metrics from them together.

\b
  petals-eval run ... --shard 1/2 --out runs/part-1
  petals-eval run ... --shard 2/2 --out runs/part-2
  petals-eval merge runs/part-1 runs/part-2 --out runs/whole

Parts that are missing, given twice, not finished or of another run are refused.
"""


@flags_of(ResultSettings)
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders of the parts.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Run folder to make.")],
    **flags: Any,
) -> int:
    typer.echo(f"joining {plural(len(parts), 'part')}", err=True)

    from petals_eval.cli.evaluation import draw_page, show_result
    from petals_eval.evaluation.merge import merge as merge_parts
    from petals_eval.runs import Manifest
    from petals_eval.runs.thresholds import check_parts, parse_thresholds

    first = Manifest.read(parts[0] / "manifest.json")
    settings = ResultSettings(**{**first.bars, **flags})
    names = first.run_settings.get("label_names")
    labels = [str(name) for name in names] if isinstance(names, list) else []
    thresholds = parse_thresholds(settings.fail_under, settings.fail_over, labels, kind=first.kind)
    check_parts(thresholds, first.answer_columns)
    code = show_result(merge_parts(parts, out=out), out, thresholds, settings)
    draw_page(settings, out)
    return code
