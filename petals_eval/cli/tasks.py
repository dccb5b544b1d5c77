"""`petals-eval tasks`: the tasks that ship."""

import typer

__all__ = ["HELP", "tasks"]

HELP = "List the tasks that ship, with their labels, data and text template."


def tasks() -> int:
    from petals_eval.tasks import list_tasks

    for task in list_tasks():
        typer.echo(f"{task.name:<10} {task.description}")
        rows = {
            "labels": ", ".join(task.label_names),
            "text": f"{task.text!r}, at most {task.max_length} tokens",
            "data": " ".join(filter(None, (task.data.path, task.data.subset, task.data.split))) if task.data else "",
            "metrics": ", ".join(task.metrics),
        }
        for name, value in rows.items():
            typer.echo(f"{'':<10} {name:<8} {value}")
    typer.echo("\nA task of your own is a YAML file with these keys: petals-eval run --task my-task.yaml ...")
    return 0
