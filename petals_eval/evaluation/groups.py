"""A group of tasks before it begins: every member prepared, so that a mistake in the last one shows first."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError, PetalsEvalError
from petals_eval.evaluation.prepare import Prepared, options_of_run, prepare, side_of_run
from petals_eval.remote_model import LocalSide
from petals_eval.runs.disk import blame_the_machine
from petals_eval.runs.folder import new_default_folder
from petals_eval.tasks import TaskGroup, load_task
from petals_eval.tasks.group import folder_name

if TYPE_CHECKING:
    from petals_eval.local_swarm import LocalSwarm

__all__ = ["PreparedGroup", "prepare_group", "prepare_group_run"]


@dataclass(frozen=True, eq=False)
class PreparedGroup:
    """A group that may begin.

    members: its tasks, in their order; each has a folder below `out`. side, local_swarm: as `Prepared` has them, and
    the same for all members.
    """

    group: TaskGroup
    members: tuple[Prepared, ...]
    side: LocalSide
    out: Path | None
    is_kept: bool
    local_swarm: "LocalSwarm | None" = None

    @property
    def total(self) -> int:
        """How many examples are scored in all: those of members that are finished already are not."""
        return sum(member.total for member in self.members if not member.is_finished)

    def in_folder(self) -> "PreparedGroup":
        """Return the group with a folder for each of its members, made below a new one where none was named."""
        if not self.is_kept:
            return self
        out = self.out if self.out is not None else new_default_folder(self.group.name)
        with blame_the_machine(out):
            out.mkdir(parents=True, exist_ok=True)
        members = tuple(replace(each, out=out / folder_name(each.task.name)) for each in self.members)
        return replace(self, out=out, members=members)


def prepare_group(
    open_side: Callable[[], LocalSide],
    group: TaskGroup,
    *,
    out: str | Path | None = None,
    is_kept: bool = True,
    data: object = None,
    shard: str | None = None,
    save_texts: bool = False,
    **options: Any,
) -> PreparedGroup:
    """Read and check what the tasks of a group need.

    open_side: loads our side of the model; called once. save_texts: of those that generate some. options: of `prepare`,
    the same for all of them.
    Raises ConfigError for what a group cannot have, and as `prepare` does, with the task's name.
    """
    for name, given, advice in (
        ("data", data, "put data into the group's tasks, as {task: sst2, data: {path: my-rows.csv}}"),
        ("shard", shard, "evaluate its tasks by themselves, which can be merged"),
    ):
        if given is not None:
            raise ConfigError(f"{name}: not for all tasks of group {group.name} together: {advice}.")
    if out is not None and Path(out).is_file():
        raise ConfigError(f"out: expected a folder for group {group.name}, found a file at {out}.")
    tasks = [load_task(member) for member in group.tasks]
    if save_texts and not any(task.kind == "generation" for task in tasks):
        raise ConfigError(f"--save-texts: no task of group {group.name} generates texts; leave it out.")
    side_of_all = cache(open_side)
    members = []
    for task in tasks:
        place = None if out is None else Path(out) / folder_name(task.name)
        wanted = () if group.metric is None else (group.metric,)
        try:
            members.append(
                prepare(
                    side_of_all,
                    task=task,
                    out=place,
                    is_kept=is_kept,
                    more_metrics=wanted,
                    may_be_finished=True,
                    save_texts=save_texts and task.kind == "generation",
                    **options,
                )
            )
        except PetalsEvalError as error:
            error.add_note(f"  This concerns task {task.name} of group {group.name}.")
            raise
    return PreparedGroup(group, tuple(members), members[0].side, None if out is None else Path(out), is_kept)


def prepare_group_run(settings: RunSettings, group: TaskGroup) -> PreparedGroup:
    """Prepare the group that the command was told of. Raises as `prepare_group` does."""
    open_side, swarms = side_of_run(settings)
    options = options_of_run(settings)
    del options["task"]
    prepared = prepare_group(open_side, group, **options)
    return replace(prepared, local_swarm=swarms[0] if swarms else None)
