"""Tasks by name, by file or as objects, and the data each of them reads."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from petals_eval.data.source import DataSource, FileReading, format_of, is_local
from petals_eval.data.yaml_text import read_yaml, resolve_nulls
from petals_eval.environment import local_path
from petals_eval.errors import ConfigError, TaskError
from petals_eval.tasks.base import Task
from petals_eval.tasks.choice import ChoiceTask
from petals_eval.tasks.classification import ClassificationTask
from petals_eval.tasks.continuation import ContinuationTask
from petals_eval.tasks.generation import GenerationTask
from petals_eval.tasks.group import TaskGroup, folder_name
from petals_eval.tasks.perplexity import PerplexityTask
from petals_eval.tasks.prompted import Prompting
from petals_eval.tasks.regression import RegressionTask
from petals_eval.validation import closest, closest_beside, shorten

__all__ = [
    "DefinedTask",
    "list_tasks",
    "load_group",
    "load_task",
    "resolve_source",
    "shipped_yaml",
    "task_of_fingerprint",
]

DefinedTask = ClassificationTask | RegressionTask | ChoiceTask | ContinuationTask | PerplexityTask | GenerationTask
"""A task that a YAML file can define."""

_KINDS: dict[str, type[DefinedTask]] = {
    "classification": ClassificationTask,
    "regression": RegressionTask,
    "choice": ChoiceTask,
    "continuation": ContinuationTask,
    "perplexity": PerplexityTask,
    "generation": GenerationTask,
}
_SUFFIXES = (".yaml", ".yml")
_GROUP_KEYS = ("group", "tasks", "metric", "description")


def load_task(task: "str | Path | Mapping[str, Any] | Task") -> Task:
    """Return a shipped task by its name, a task of your own by the path of its YAML file or by what such a file holds,
    or a task object as it is.

    In a YAML file a relative path of `data`, or of the data of `shots`, starts at the file's own folder, in a mapping
    at the current one. A mapping without a name is called "task".
    Raises TaskError, which names the file, the key, what was expected there and what was found.
    """
    if isinstance(task, Mapping):
        built = _build(dict(task), "the task's mapping", name="task", folder=None)
        _check_metrics(built, "the task's mapping")
        return built
    if not isinstance(task, str | Path):
        if not isinstance(task, Task):
            raise TaskError(
                "expected the name of a task, the path of a YAML file, a mapping of what one holds, or a Task object, "
                f"found {type(task).__name__}. "
                "A Task has name, kind, columns, label_names, metrics, head, examples, predict and fingerprint."
            )
        _check_metrics(task, "the task object")
        return task
    shipped = _shipped()
    if isinstance(task, str) and task in shipped:
        return _parse(shipped[task], f"the shipped task {task}", name=task, folder=None)
    path = local_path(task)
    if path.is_file():
        loaded = _parse(_read(path), str(task), name=path.stem, folder=path.parent)
        _check_metrics(loaded, str(task))
        return loaded
    if path.suffix in _SUFFIXES or len(path.parts) > 1:
        raise TaskError(f"there is no task file {task} (looked for {path.absolute()}).{closest_beside(path)}")
    beside = [f"{path}{suffix}" for suffix in _SUFFIXES if path.with_name(path.name + suffix).is_file()]
    meant = f" Did you mean the file {beside[0]}?" if beside else closest(str(task), shipped)
    raise TaskError(
        f"there is no task {task}.{meant} Shipped tasks: {', '.join(sorted(shipped))}. "
        "A task of your own is given by the path of its YAML file."
    )


def task_of_fingerprint(fingerprint: Mapping[str, Any]) -> Task:
    """Return a task that reads rows as the one did that this is the fingerprint of, under the name beside it.

    It has nothing that stands around a question, and neither that one's data nor its metrics.
    Raises TaskError where the fingerprint does not say all that is needed.
    """
    kind = _KINDS.get(str(fingerprint.get("kind")), ClassificationTask)
    around = Prompting.model_fields.keys() - {"prepare"}
    keys = {field.alias or name for name, field in kind.model_fields.items() if name not in around}
    values = {key: value for key, value in fingerprint.items() if key in keys}
    return _build(values, "the task in the manifest", name="task", folder=None)


def load_group(group: object) -> TaskGroup | None:
    """Return a group with its tasks loaded; None for what is a task, or no group.

    group: a TaskGroup, the path of a YAML file with the keys `group` and `tasks`, or a mapping with them. One of the
    tasks may be a shipped task's name, a file, whose relative path starts at the folder of the group's own, a mapping
    as a task's file holds it, or a mapping with the key `task`, a name or a file, some of whose keys are to be others.
    Raises TaskError as `load_task` does, and for two tasks of one name.
    """
    if isinstance(group, TaskGroup):
        return _distinct(replace(group, tasks=tuple(map(load_task, group.tasks))))
    if isinstance(group, Mapping):
        return _group(dict(group), f"group {group['group']}", None) if "group" in group else None
    if not isinstance(group, str | Path) or not local_path(group).is_file() or group in _shipped():
        return None
    path = local_path(group)
    try:
        values = read_yaml(_read(path))
    except ValueError:
        return None  # what is wrong with it, `load_task` says
    is_group = isinstance(values, dict) and "group" in values
    return _group(values, str(group), path.parent) if is_group else None


def list_tasks() -> list[DefinedTask]:
    """Return the tasks that come with the package, by name."""
    shipped = _shipped()
    return [_parse(shipped[name], f"the shipped task {name}", name=name, folder=None) for name in sorted(shipped)]


def shipped_yaml(name: str) -> str:
    """Return the YAML text of a task that comes with the package. Raises TaskError, with names that come close."""
    shipped = _shipped()
    if name not in shipped:
        raise TaskError(
            f"there is no shipped task {name}.{closest(name, shipped)} There are: {', '.join(sorted(shipped))}."
        )
    return shipped[name]


def resolve_source(task: Task, path: str | Path | None = None, **overrides: Any) -> DataSource:
    """Return what `task` reads: its own default data, or `path` (a local file or a hub name).

    A local file is read as the task's `formats` say for its format. `overrides` are settings of `DataSource` that win
    over those, such as split="train" or encoding="utf-8"; None among them means "as it is".

    Raises ConfigError when there is no path and the task has no data of its own, and DataError for a wrong setting.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    default: DataSource | None = getattr(task, "data", None)
    if path is None:
        if default is None:
            raise ConfigError(
                f"task {task.name} has no data of its own: give --data, a file or the name of a data set on the hub."
            )
        return DataSource.model_validate({**_settings(default), **given})
    wanted = DataSource.model_validate({"path": str(path), **given})
    if not is_local(wanted):
        # The same data set under the same name keeps the task's subset and split.
        base = _settings(default) if default is not None and default.path == wanted.path else {}
        return DataSource.model_validate({**base, "path": str(path), **given})
    formats: Mapping[str, FileReading] = getattr(task, "formats", {})
    reading = formats.get(wanted.format or format_of(wanted.path))
    if reading is None or local_path(wanted.path).is_dir():
        return wanted
    return DataSource.model_validate({**_settings(reading), **_settings(wanted)})


def _settings(model: FileReading) -> dict[str, object]:
    """Return the settings that were given, as they are (a secret stays one)."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def _shipped() -> dict[str, str]:
    """Return the YAML text of each shipped task, by name."""
    folder = resources.files("petals_eval.tasks") / "builtin"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as a task: expected a YAML file in utf-8 ({error}).") from None


def _parse(text: str, origin: str, *, name: str, folder: Path | None) -> DefinedTask:
    return _build(_values(text, origin), origin, name=name, folder=folder)


def _values(text: str, origin: str) -> dict[Any, Any]:
    try:
        values = read_yaml(text)
    except ValueError as error:
        comma = "," if str(error).startswith("line ") else ":"
        raise TaskError(f"{origin}{comma} {error}.") from None
    if not isinstance(values, dict):
        raise TaskError(
            f"{origin}: expected keys and values (name, text, label_column, label_names, ...), found {shorten(values)}."
        )
    return values


def _build(values: dict[Any, Any], origin: str, *, name: str, folder: Path | None) -> DefinedTask:
    kind = values.get("kind", "classification")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise TaskError(f"{origin}: kind should be one of {', '.join(_KINDS)}, found {shorten(kind)}.")
    unknown = [key for key in values if not isinstance(key, str)]
    if unknown:
        raise TaskError(f"{origin}: every key should be text, found {shorten(unknown[0])}.")
    values = resolve_nulls(values, _KINDS[kind])
    try:
        task = _KINDS[kind].model_validate({"name": name, **_with_own_folder(values, folder)})
    except TaskError as error:
        raise TaskError(f"{origin}: {error}") from None
    if isinstance(task, Prompting) and folder is not None:
        task._folder = str(folder)  # where the module of its `prepare` may lie
    return task


def _group(values: dict[Any, Any], origin: str, folder: Path | None) -> TaskGroup:
    """Return the group that these values of a YAML file or a program define."""
    for key in values:
        if key not in _GROUP_KEYS:
            known = ", ".join(_GROUP_KEYS)
            raise TaskError(f"{origin}: {key}: unknown key of a group.{closest(str(key), _GROUP_KEYS)} Known: {known}.")
    for key in ("group", "metric", "description"):
        if not isinstance(values.get(key, ""), str | None):
            raise TaskError(f"{origin}: {key}: should be text, found {shorten(values[key])}.")
    members = values.get("tasks")
    if not isinstance(members, list | tuple) or not members:
        raise TaskError(f"{origin}: tasks: should be a list of tasks, such as [sst2, cola], found {shorten(members)}.")
    tasks = tuple(_member(member, f"{origin}, task {number}", folder) for number, member in enumerate(members, 1))
    metric = values.get("metric")
    found = TaskGroup(
        str(values["group"]), tasks, None if metric is None else str(metric), str(values.get("description") or "")
    )
    return _distinct(found)


def _member(member: object, origin: str, folder: Path | None) -> Task:
    if isinstance(member, str):
        return load_task(_beside(member, folder))
    if not isinstance(member, Mapping):
        if isinstance(member, Task):
            return load_task(member)
        raise TaskError(
            f"{origin}: should be a task's name, its file, or its keys and values, found {shorten(member)}."
        )
    own = dict(_with_own_folder(dict(member), folder))
    name, home = own.get("name"), folder
    if "task" in own:
        base = own.pop("task")
        if not isinstance(base, str):
            raise TaskError(f"{origin}: task: should be a task's name or its file, found {shorten(base)}.")
        loaded = load_task(_beside(base, folder))  # whatever is wrong with it is said of it
        place = local_path(_beside(base, folder))
        shipped = _shipped().get(base)
        home = None if shipped is not None else place.parent
        text = shipped if shipped is not None else _read(place)
        own = {**_with_own_folder(_values(text, base), home), **own}
        name = own.get("name", loaded.name)
    if not isinstance(name, str) or not name:
        raise TaskError(f"{origin}: name: missing, and a task of a group must have one.")
    task = _build(own, origin, name=name, folder=home)
    _check_metrics(task, origin)
    return task


def _beside(task: str, folder: Path | None) -> str:
    """Return the path of a file beside the group's, or what is a shipped task's name or a path of its own."""
    if folder is None or task in _shipped():
        return task
    beside = folder / local_path(task)
    return str(beside) if beside.is_file() else task


def _distinct(group: TaskGroup) -> TaskGroup:
    names = Counter(folder_name(task.name) for task in group.tasks if isinstance(task, Task))
    for name, count in names.items():
        if count > 1:
            raise TaskError(
                f"group {group.name}: expected tasks of different names, found {count} called {name!r}: each has a "
                "folder of that name. Give one of them another name."
            )
    return group


def _with_own_folder(values: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return `values`, where a relative path of `data`, or of that of `shots`, that exists beside the task's file
    starts there."""
    shots = values.get("shots")
    if isinstance(shots, Mapping) and "data" in shots:
        values = {**values, "shots": _with_own_folder(dict(shots), folder)}
    data = values.get("data")
    if folder is None or not isinstance(data, Mapping) or not isinstance(data.get("path"), str):
        return values
    beside = folder / local_path(data["path"])
    return {**values, "data": {**data, "path": str(beside)}} if beside.exists() else values


def _check_metrics(task: Task, origin: str) -> None:
    """Raise TaskError for unknown metrics, before anything is computed. Shipped tasks are checked by their test."""
    from petals_eval.metrics import check_metric_names  # here, because listing tasks needs no numpy

    try:
        check_metric_names(task.metrics, task.kind, label_names=task.label_names)
    except ConfigError as error:
        raise TaskError(f"{origin}: metrics: {error}") from None
