"""The outputs of a model's own head, as its config names them, against a task's label names."""

from collections.abc import Mapping, Sequence

from petals_eval.errors import TaskError
from petals_eval.tasks.base import Task

__all__ = ["check_head_labels"]


def check_head_labels(task: Task, output_names: Sequence[str] | None) -> None:
    """Raise TaskError where a head's output has the name of one label and the place of another one.

    output_names: what the config of the model whose head is used calls its outputs (id2label), in order; None: nothing.
    Names are compared without regard to case, a key of the task's `label_map` stands for its label, and names that the
    task does not have say nothing.
    """
    if output_names is None or task.head != "class":
        return
    for output, name in enumerate(output_names):
        label = _label_called(task, name)
        if label is not None and label != output:
            raise TaskError(
                f"the model's config calls output {output} of its head {name!r:.40} (id2label), which in task "
                f"{task.name} is label {label}: answers would be given to the wrong labels.\n"
                f"  expected  label_names in the order of the head's outputs: {', '.join(output_names)}\n"
                f"  found     {', '.join(task.label_names)}\n"
                "  Correct label_names, or the config's id2label where that is what is wrong."
            )


def _label_called(task: Task, name: str) -> int | None:
    """Return the label that is called so, where exactly one is."""
    mapping: Mapping[str, str] = getattr(task, "label_map", {})
    names = list(task.label_names)
    if name in names:
        return names.index(name)
    called = {index for index, label in enumerate(names) if _same(label, name)}
    called |= {names.index(label) for key, label in mapping.items() if _same(key, name)}
    return called.pop() if len(called) == 1 else None


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()
