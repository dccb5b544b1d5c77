"""`petals-eval tasks`: the tasks that ship, and the metrics that there are."""

from textwrap import fill
from typing import Annotated

import typer

__all__ = ["HELP", "SHORT", "tasks"]

SHORT = "List the tasks that ship, print one, or list metrics."
HELP = """List the tasks that ship by kind, print one of them to start your own from, or list the metrics.

\b
  petals-eval tasks
  petals-eval tasks boolq > mine.yaml
  petals-eval tasks --metrics
  petals-eval tasks --metrics choice
"""


def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A task, or with --metrics a kind.")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="List the metrics by kind of task.")] = False,
) -> int:
    if metrics:
        _list_metrics(name)
    elif name is None:
        _list_tasks()
    else:
        from petals_eval.tasks import shipped_yaml

        typer.echo(shipped_yaml(name), nl=False)
    return 0


def _list_tasks() -> None:
    from petals_eval.tasks import list_tasks

    shipped = list_tasks()
    for kind in dict.fromkeys(task.kind for task in shipped):
        typer.echo(f"{kind}:")
        for task in shipped:
            if task.kind == kind:
                source = task.data
                data = " ".join(filter(None, (source.path, source.subset, source.split))) if source else "none"
                _say(f"  {task.name:<14} ", task.description)
                typer.echo(f"  {'':<14} data {data}")
    typer.echo(
        "\npetals-eval tasks NAME prints a task as the YAML file that it is, to start your\n"
        "own from: petals-eval run --task my-task.yaml. petals-eval guide tasks has the\n"
        "keys; --metrics lists the metrics."
    )


def _list_metrics(kind: str | None) -> None:
    from petals_eval.metrics import KINDS, available_metrics

    for each in KINDS if kind is None else (kind,):
        width = max(map(len, available_metrics(each)))
        typer.echo(f"{each}:")
        for spec in KINDS[each]:
            _say(f"  {spec.name:<{width}}  ", spec.about)


def _say(name: str, text: str) -> None:
    """Print the text beside the name, in as many lines as the terminal's width takes."""
    from petals_eval.text import console_for

    width, indent = console_for().width, " " * len(name)
    typer.echo(fill(text, width, initial_indent=name, subsequent_indent=indent, break_on_hyphens=False))
