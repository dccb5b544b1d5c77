"""A group of tasks: evaluated one after the other, with a mean over all of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.errors import TaskError

if TYPE_CHECKING:
    from petals_eval.tasks.base import Task

__all__ = ["TaskGroup"]


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are evaluated one after the other over one connection.

    name: of the group. tasks: shipped tasks by name, files, mappings as a task's file holds them, or task objects.
    metric: the only one that is averaged over the tasks; None: every one that all of them have.
    Raises TaskError for tasks of one name: each has a folder of that name.
    """

    name: str
    tasks: "tuple[str | Path | Task | Mapping[str, Any], ...]"
    metric: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise TaskError(f"group {self.name}: expected at least one task, found none.")


def folder_name(task_name: str) -> str:
    """Return the name of a task's folder in that of its group.

    >>> folder_name("sst2"), folder_name("my questions/1")
    ('sst2', 'my-questions-1')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", task_name).strip(".-") or "task"
