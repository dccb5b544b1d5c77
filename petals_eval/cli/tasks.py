"""`petals-eval tasks`: the tasks that ship."""

import typer

__all__ = ["HELP", "SHORT", "tasks"]

SHORT = "List the tasks that ship."
HELP = "List the tasks that ship, with their labels, data and text template."


def tasks() -> int:
    from petals_eval.tasks import list_tasks

    for task in list_tasks():
        source, texts = task.data, filter(None, (task.text, task.text_pair))
        rows = {
            "labels": ", ".join(task.label_names) or "numbers",
            "text": f"{' with '.join(map(repr, texts))}, at most {task.max_length} tokens",
            "data": " ".join(filter(None, (source.path, source.subset, source.split))) if source else "none",
            "metrics": ", ".join(task.metrics),
        }
        typer.echo(f"{task.name:<10} {task.description}")
        for name, value in rows.items():
            typer.echo(f"{'':<10} {name:<8} {value}")
    typer.echo("\nA task of your own is a YAML file: petals-eval run --task my-task.yaml (README.md shows one).")
    return 0
