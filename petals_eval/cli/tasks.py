"""`petals-eval tasks`: the tasks that ship."""

import typer

__all__ = ["HELP", "tasks"]

HELP = "List the tasks that ship, with their labels, data and text template."


def tasks() -> int:
    from petals_eval.tasks import list_tasks

    for task in list_tasks():
        source = "" if task.data is None else f"{task.data.path}{f'/{task.data.subset}' if task.data.subset else ''}"
        typer.echo(f"{task.name:<10} {task.description}")
        typer.echo(f"{'':<10} labels   {', '.join(task.label_names)}")
        typer.echo(f"{'':<10} text     {task.text!r}, at most {task.max_length} tokens")
        typer.echo(f"{'':<10} data     {source} ({task.data.split if task.data else ''})")
        typer.echo(f"{'':<10} metrics  {', '.join(task.metrics)}")
    typer.echo("\nA task of your own is a YAML file with these keys: petals-eval run --task my-task.yaml ...")
    return 0
