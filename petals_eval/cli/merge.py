"""`petals-eval merge`: join the parts of a run that were evaluated apart."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["HELP", "SHORT", "merge"]

SHORT = "Join the parts of a run (--shard) into one."
HELP = """Join the run folders of all parts of a run into one, and compute its metrics from them together.

\b
  petals-eval run ... --shard 1/2 --out runs/part-1
  petals-eval run ... --shard 2/2 --out runs/part-2
  petals-eval merge runs/part-1 runs/part-2 --out runs/whole

Parts that are missing, given twice, not finished or of another run are refused.
"""


def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders of the parts.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Run folder to make.")],
    max_failed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Exit code 1 if more examples than this failed. Default: 0.")
    ] = 0,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Exit code 1 if a metric is below this; repeatable."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print metrics.json alone on stdout.")] = False,
) -> int:
    from petals_eval.cli.evaluation import show_result
    from petals_eval.evaluation.merge import merge as merge_parts
    from petals_eval.runs import Manifest
    from petals_eval.runs.thresholds import Bar

    names = Manifest.read(parts[0] / "manifest.json").run_settings.get("label_names")
    labels = [str(name) for name in names] if isinstance(names, list) else []
    bars = [Bar.parse(text, labels) for text in fail_under or ()]
    result = merge_parts(parts, out=out)
    return show_result(result, out, bars, max_failed=max_failed, as_json=json_output)
