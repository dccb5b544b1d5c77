"""What a group of tasks reached: each task's result, and the means over tasks and over rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from petals_eval.errors import RunFolderError
from petals_eval.metrics import title_of
from petals_eval.runs.disk import blame_the_machine, write_atomically
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.results import SCHEMA_VERSION, AdapterResult, RunResult
from petals_eval.tasks.group import folder_name
from petals_eval.text import number_text

__all__ = ["GroupMean", "GroupResult"]


@dataclass(frozen=True, slots=True)
class GroupMean:
    """A metric over the tasks of a group.

    over_tasks: each task counts alike. over_rows: each counts by the rows that its metrics are over. None: one of the
    tasks has no value.
    """

    over_tasks: float | None
    over_rows: float | None


@dataclass(frozen=True, eq=False)
class GroupResult:
    """What `evaluate` returns of a group.

    tasks: the result of each, by its name, in their order. metric: the only one that is averaged, where one was named.
    """

    group: str
    tasks: Mapping[str, RunResult]
    metric: str | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, in the order they were given."""
        return tuple(next(iter(self.tasks.values())).adapters)

    def of(self, adapter: str) -> dict[str, AdapterResult]:
        """Return what an adapter reached, by task."""
        return {name: result.adapters[adapter] for name, result in self.tasks.items()}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that all tasks have, those of single labels not among them."""
        results = [result.first.metrics for result in self.tasks.values()]
        common = [name for name in results[0] if all(name in each for each in results) and "[" not in name]
        return tuple(name for name in common if self.metric in (None, name))

    def means(self, adapter: str) -> dict[str, GroupMean]:
        """Return the means of an adapter's metrics, by name."""
        results = list(self.of(adapter).values())
        rows = [result.n_scored - result.n_unlabelled for result in results]
        found = {}
        for name in self.metric_names:
            values = [result.metrics[name].value for result in results]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                found[name] = GroupMean(None, None)
                continue
            weighted = sum(value * count for value, count in zip(known, rows, strict=True))
            over_rows = weighted / sum(rows) if sum(rows) else None
            found[name] = GroupMean(sum(known) / len(known), over_rows)
        return found

    def to_json(self) -> dict[str, object]:
        """Return `group.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "means": {
                adapter: {
                    name: {"over_tasks": mean.over_tasks, "over_rows": mean.over_rows}
                    for name, mean in self.means(adapter).items()
                }
                for adapter in self.adapters
            },
            "tasks": {name: result.to_json() for name, result in self.tasks.items()},
        }

    @classmethod
    def of_folder(cls, folder: Path) -> "GroupResult":
        """Compute the result anew of a group that was evaluated into this folder.

        Raises RunFolderError where there is none, or one of its tasks is not there.
        """
        path = folder / "group.json"
        with blame_the_machine(path):
            text = path.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
            name, tasks = str(found["group"]), list(found["tasks"])
            averaged = {metric for means in found["means"].values() for metric in means}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RunFolderError(f"Expected the result of a group in {path}; found something else: {error}.") from None
        results = {}
        for task in tasks:
            with RunFolder.open(folder / folder_name(task)) as opened:
                results[task] = opened.result()
        return cls(name, results, averaged.pop() if len(averaged) == 1 else None)

    def write(self, folder: Path) -> None:
        """Write `group.json`. Raises MachineError."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / "group.json", [text, "\n"])

    def __str__(self) -> str:
        """Return a line for each task, and one for the means of each adapter."""
        lines = [f"{name}: {result}" for name, result in self.tasks.items()]
        for adapter in self.adapters:
            means = [
                f"{title_of(name)} {number_text(mean.over_tasks)} ({number_text(mean.over_rows)} over rows)"
                for name, mean in self.means(adapter).items()
                if mean.over_tasks is not None and mean.over_rows is not None
            ]
            whose = f", {adapter}" if len(self.adapters) > 1 else ""
            lines.append(f"mean{whose}: {', '.join(means)}")
        return "\n".join(lines)
