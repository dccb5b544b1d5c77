"""The trackers that results can be logged to. None is required: each is imported when something is logged."""

import contextlib
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petals_eval.errors import ConfigError
from petals_eval.runs import Manifest, RunResult
from petals_eval.text import plural
from petals_eval.tracking.logged import logged_settings, logged_values

__all__ = ["TRACKERS", "Tracker", "log_results", "trackers_of"]

DEFAULT_PLACE = "petals-eval"

Values = Mapping[str, float]
Settings = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Tracker:
    """Where to log. name: one of `TRACKERS`. place: the project, experiment or folder there; None: the usual one."""

    name: str
    place: str | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of tracker. module: what must be there, which the extra of the kind's name brings. place: what it is.

    log: logs numbers, with the settings of the run where it begins one of its own, and returns where they are.
    """

    module: str
    place: str
    log: Callable[[Tracker, Values, Settings, int | None], str]


def trackers_of(log_to: str | Sequence[str] | None) -> tuple[Tracker, ...]:
    """Return the trackers that are meant, each "NAME" or "NAME=PLACE". Raises ConfigError for one that is not known or
    whose package is not installed: before anything is computed."""
    named = [log_to] if isinstance(log_to, str) else list(log_to or ())
    found = []
    for each in named:
        name, _, place = each.partition("=") if isinstance(each, str) else ("", "", "")
        kind = TRACKERS.get(name)
        if kind is None:
            raise ConfigError(f"--log-to: expected one of {', '.join(TRACKERS)}, or NAME=PLACE; found {each!r}.")
        if not _is_installed(kind.module):
            raise ConfigError(
                f"--log-to {name}: expected the package {kind.module.partition('.')[0]}, found none installed. "
                f"Install it with: pip install 'petals-eval[{name}]'"
            )
        found.append(Tracker(name, place or None))
    return tuple(found)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what the module would be a part of
        return False


def log_results(
    trackers: Sequence[Tracker],
    results: Sequence[tuple[RunResult, Manifest]],
    *,
    step: int | None = None,
    say: Callable[[str], object],
    say_where: Callable[[str], object] = lambda line: None,
) -> None:
    """Log results, of one run or of the tasks of a group, to each tracker; `logged_values` has the names.

    A run that is open in this process, such as that of a training loop, takes them; otherwise each call makes one.
    step: of the training, such as the epoch.
    say: told in a line what went wrong: the results are there, and are not lost by a tracker that fails.
    say_where: told in a line for each other tracker where it has them.
    """
    values = {name: value for result, _ in results for name, value in logged_values(result).items()}
    settings = logged_settings(results[0][1])
    if len(results) > 1:
        settings = {**settings, "task": ", ".join(result.task for result, _ in results)}
    for tracker in trackers:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be JSON, and some greet whoever logs
                where = TRACKERS[tracker.name].log(tracker, values, settings, step)
            say_where(f"logged: {tracker.name}, {where}")
        except Exception as error:  # noqa: BLE001  # of another library, and whatever it is: the result must not be lost
            say(
                f"note: {plural(len(values), 'number')} could not be logged to {tracker.name}: "
                f"{type(error).__name__}: {error}"
            )


def _log_to_wandb(tracker: Tracker, values: Values, settings: Settings, step: int | None) -> str:
    wandb: Any = importlib.import_module("wandb")
    run, is_ours = wandb.run, wandb.run is None
    if is_ours:
        project = tracker.place or os.environ.get("WANDB_PROJECT") or DEFAULT_PLACE
        run = wandb.init(project=project, config=dict(settings), job_type="evaluation")
    try:
        steps: dict[str, float] = {}
        if step is not None:
            # An axis of its own: W&B's steps only go up, and those of a training loop are further on than an epoch.
            for task in dict.fromkeys(name.partition("/")[0] for name in values):
                run.define_metric(f"{task}/step")
                run.define_metric(f"{task}/*", step_metric=f"{task}/step")
                steps[f"{task}/step"] = step
        run.log({**values, **steps})
        return str(getattr(run, "url", None) or f"project {run.project}")
    finally:
        if is_ours:
            run.finish()


def _log_to_trackio(tracker: Tracker, values: Values, settings: Settings, step: int | None) -> str:
    trackio: Any = importlib.import_module("trackio")
    is_ours = importlib.import_module("trackio.context_vars").current_run.get() is None
    where = "the run that is open"
    if is_ours:
        project = tracker.place or os.environ.get("TRACKIO_PROJECT") or DEFAULT_PLACE
        where = f"project {project} (trackio show --project {shlex.quote(project)})"
        trackio.init(project=project, config=dict(settings), embed=False)
    try:
        trackio.log(dict(values), step=step)
        return where
    finally:
        if is_ours:
            trackio.finish()


def _log_to_mlflow(tracker: Tracker, values: Values, settings: Settings, step: int | None) -> str:
    mlflow: Any = importlib.import_module("mlflow")
    if mlflow.active_run() is not None:
        mlflow.log_metrics(dict(values), step=step or 0)
        return "the run that is open"
    if tracker.place is not None or not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        mlflow.set_experiment(tracker.place or DEFAULT_PLACE)
    with mlflow.start_run():
        mlflow.log_params(dict(settings))
        mlflow.log_metrics(dict(values), step=step or 0)
    experiment = tracker.place or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PLACE
    return f"experiment {experiment} (mlflow ui)"


def _log_to_tensorboard(tracker: Tracker, values: Values, settings: Settings, step: int | None) -> str:
    # torch's own default is below runs/, where our run folders are.
    folder = tracker.place or DEFAULT_PLACE
    with _summary_writer(folder) as writer:
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=step or 0)
        writer.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in settings.items()), step or 0)
    return f"folder {folder} (tensorboard --logdir {shlex.quote(folder)})"


def _summary_writer(folder: str) -> Any:
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)


TRACKERS: Mapping[str, _Kind] = {
    "wandb": _Kind("wandb", "project", _log_to_wandb),
    "trackio": _Kind("trackio", "project", _log_to_trackio),
    "mlflow": _Kind("mlflow", "experiment", _log_to_mlflow),
    "tensorboard": _Kind("tensorboard", "folder", _log_to_tensorboard),
}
"""The kinds of trackers, by the names that they are asked for by."""
