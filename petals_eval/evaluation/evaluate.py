"""The evaluation: from rows to a result, tied together."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from petals_eval.config import Place, Positive, PromptSettings, Settings
from petals_eval.errors import CallerError, ConfigError, InterruptedRunError, MachineError, PetalsEvalError
from petals_eval.evaluation.groups import PreparedGroup, prepare_group
from petals_eval.evaluation.noise import note_noise
from petals_eval.evaluation.prepare import Data, Prepared, prepare
from petals_eval.evaluation.scoring import Progress, Scoring
from petals_eval.evaluation.wire_error import note_sample
from petals_eval.remote_model import LocalSide
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.group_result import GroupResult
from petals_eval.runs.results import RunResult, run_result
from petals_eval.runs.row_texts import RowSource
from petals_eval.tasks import Task, TaskGroup, load_group
from petals_eval.tracking import log_results, trackers_of

if TYPE_CHECKING:
    import torch

    from petals_eval.remote_model import RemoteModel

__all__ = [
    "Progress",
    "check_progress",
    "evaluate",
    "evaluate_group",
    "evaluate_prepared",
    "finish",
    "finished_group",
    "finished_result",
    "is_remote_model",
]


_log = logging.getLogger("petals_eval")


class _Options(TypedDict, total=False):
    """What `evaluate` takes besides the model and the task, for type checkers: what it returns depends on the task."""

    data: Data | None
    limit: int | None
    seed: int
    shard: str | None
    unlabelled: Literal["error", "predict"] | None
    without_prompts: bool
    shots: int | None
    shots_data: str | Path | None
    shots_split: str | None
    shots_seed: int | None
    draws: int
    chat: bool
    system: str | None
    bos: Literal["auto", "always", "never"] | None
    allow_task_code: bool
    save_texts: bool
    no_noise: bool
    log_to: str | Sequence[str] | None
    log_step: int | None
    out: str | Path | None
    tokens_per_micro_batch: int | None
    tokenizer: Any
    progress: Progress | bool | None


@overload
def evaluate(
    model: "RemoteModel | torch.nn.Module", *, task: TaskGroup, **options: Unpack[_Options]
) -> GroupResult: ...


@overload
def evaluate(
    model: "RemoteModel | torch.nn.Module",
    *,
    task: str | Path | Mapping[str, Any] | Task,
    **options: Unpack[_Options],
) -> RunResult: ...


def evaluate(
    model: "RemoteModel | torch.nn.Module",
    *,
    task: str | Path | Mapping[str, Any] | Task | TaskGroup,
    data: Data | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    unlabelled: Literal["error", "predict"] | None = None,
    without_prompts: bool = False,
    shots: int | None = None,
    shots_data: str | Path | None = None,
    shots_split: str | None = None,
    shots_seed: int | None = None,
    draws: int = 1,
    chat: bool = False,
    system: str | None = None,
    bos: Literal["auto", "always", "never"] | None = None,
    allow_task_code: bool = False,
    out: str | Path | None = None,
    tokens_per_micro_batch: int | None = None,
    save_texts: bool = False,
    no_noise: bool = False,
    log_to: str | Sequence[str] | None = None,
    log_step: int | None = None,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
) -> RunResult | GroupResult:
    """Evaluate a model, with each of its adapters, on a task.

    model: a RemoteModel, or a Petals model with a head (or one of DRIFT's) as it lives in a training loop: its
        embeddings, prompts and head as they are now, over our own connection to its swarm (`petals_eval.live_model`).
    task: a shipped task's name, a YAML file, a mapping of what such a file holds, or a Task object. A group of tasks (a
        TaskGroup, its YAML file or a mapping) gives a GroupResult, and `out` is then a folder with one for each task.
    data: a file, a hub name or a DataSource; rows: a list of mappings or any other iterable of them, a pandas DataFrame
        or a datasets.Dataset; None: the task's own.
    limit, seed: evaluate this many examples, drawn by the seed; the seed also draws the bootstrap of differences.
    shard: "2/3" evaluates the second of three parts; `petals_eval.merge` joins their run folders.
    unlabelled: "predict" rows that have no label, which are in no metric then; None: as the task says, which by default
        takes them for a mistake.
    without_prompts: evaluate the first adapter's head without its prompts, too.
    shots, shots_data, shots_split, shots_seed: how many rows stand before each question with their answers, and from
        where they are drawn by which seed; None: as the task says (`petals_eval.tasks.shots.Shots`).
    draws: evaluate so many draws of shots, by the seed and those after it; metrics are the means over them.
    chat, system: write texts in the tokenizer's chat template, shots as turns, with this system message.
    bos: whether a beginning-of-text token stands in front; None: as the task says.
    allow_task_code: let the task's own function prepare rows where it did not come with this package.
    out: the run folder; an unfinished run of the same settings in it goes on. None: nothing is kept.
    save_texts: keep generated texts, in texts.jsonl of the run folder and in the result's predictions.
    no_noise: do not compute rows again at the end to see which predictions rounding may change (`AdapterResult.noise`).
    log_to, log_step: log the result to "wandb", "trackio", "mlflow" or "tensorboard" as well, with "=PLACE" to a
        project, experiment or folder there, at this step of a training (`petals_eval.tracking`). One that fails is told
        of in a line.
    tokenizer: for a Petals model; None: the one that lies with the model its config names.
    progress: True: say on stderr how far it is; or an object of yours with the methods update(done, retries, servers,
        message) and waiting(message).

    The model is in the mode it was in before when this returns or raises; nothing here computes a gradient.
    The result holds every prediction, too (`RunResult.predictions`).
    An example that cannot be computed is a failure with its reason in the run folder, and is counted in the result
    (`n_failed`); it is never a wrong answer. Where none at all can be computed that is an error.

    Raises CallerError for what cannot work, SwarmError when the swarm cannot do it, MachineError for the disk,
    InterruptedRunError on Ctrl-C; what was scored by then is in the run folder.
    """
    is_remote = is_remote_model(model)
    values: dict[str, Any] = {
        "limit": limit,
        "seed": seed,
        "shard": shard,
        "unlabelled": unlabelled,
        "without_prompts": without_prompts,
        "out": out,
        "tokens_per_micro_batch": tokens_per_micro_batch,
        "save_texts": save_texts,
        "no_noise": no_noise,
        "log_step": log_step,
    }
    _Values(**values)
    check_progress(progress)
    trackers = trackers_of(log_to)
    if is_remote and tokenizer is not None:
        raise ConfigError("a RemoteModel has a tokenizer of its own: leave tokenizer= out")
    with contextlib.ExitStack() as stack:
        remote: Any = model

        def open_side() -> LocalSide:
            if is_remote:
                blocks = remote.blocks
                return LocalSide(remote.local, tuple(remote.adapters), blocks.settings, blocks.dht_prefix)
            from petals_eval import live_model

            return stack.enter_context(live_model.local_side(remote, tokenizer=tokenizer))

        def connected(side: LocalSide) -> Any:
            if is_remote:
                return remote
            from petals_eval import live_model

            return live_model.connected(remote, side)

        prompt = PromptSettings(
            shots=shots,
            shots_data=shots_data,  # type: ignore[arg-type]  # a path becomes its text there
            shots_split=shots_split,
            shots_seed=shots_seed,
            draws=draws,
            chat=chat,
            system=system,
            bos=bos,
            allow_task_code=allow_task_code,
        )
        options: dict[str, Any] = {
            "data": data,
            "limit": limit,
            "seed": seed,
            "shard": shard,
            "unlabelled": unlabelled,
            "without_prompts": without_prompts,
            "prompt": prompt,
            "out": out,
            "is_kept": out is not None,
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "save_texts": save_texts,
            "no_noise": no_noise,
        }
        group = load_group(task)
        if group is not None:
            members = prepare_group(open_side, group, **options).in_folder()
            told = stack.enter_context(display_of(progress, members.total))
            found = evaluate_group(members, connected(members.side), progress=told, keep_predictions=True)
            several = zip(found.tasks.values(), (member.manifest for member in members.members), strict=True)
            log_results(trackers, list(several), step=log_step, say=_log.warning)
            return found
        prepared = prepare(open_side, task=task, **options)  # type: ignore[arg-type]
        folder = stack.enter_context(prepared.open_folder())
        told = stack.enter_context(display_of(progress, prepared.total))
        result = evaluate_prepared(prepared, folder, connected(prepared.side), progress=told, keep_predictions=True)
        log_results(trackers, [(result, folder.manifest)], step=log_step, say=_log.warning)
        return result


class _Values(Settings):
    """The arguments of `evaluate` that are plain values, looked at before anything is read."""

    limit: int | None
    seed: int
    shard: str | None
    unlabelled: Literal["error", "predict"] | None
    without_prompts: bool
    out: Place | None
    tokens_per_micro_batch: Positive | None
    save_texts: bool
    no_noise: bool
    log_step: int | None


def is_remote_model(model: object) -> bool:
    """Return whether this is a RemoteModel, or does what one does, and no live Petals model."""
    return all(hasattr(model, name) for name in ("local", "blocks", "compute"))


def display_of(progress: Progress | bool | None, total: int | None) -> AbstractContextManager[Progress | None]:
    """Return what is told how far an evaluation of so many rows is: True stands for lines on stderr."""
    if progress is True:
        from petals_eval.report import ProgressDisplay

        return ProgressDisplay(total)
    return contextlib.nullcontext(progress or None)


def check_progress(progress: object) -> None:
    """Raise ConfigError for what does not want to know how far an evaluation is."""
    is_told = all(callable(getattr(progress, name, None)) for name in ("update", "waiting"))
    if not (progress is None or isinstance(progress, bool) or is_told):
        raise ConfigError(
            "progress: expected True, or an object with the methods update(done, retries, servers, message) and"
            f" waiting(message), found {type(progress).__name__}"
        )


def evaluate_group(
    group: PreparedGroup,
    model: "RemoteModel",
    *,
    progress: Progress | None = None,
    keep_predictions: bool = False,
) -> GroupResult:
    """Evaluate the tasks of a group, one after the other, and write `group.json` where the group has a folder.

    keep_predictions: whether the results hold every prediction.
    What is finished already is read, and not computed again. Raises as `evaluate` does.
    """
    results: dict[str, RunResult] = {}
    done = 0
    for member in group.members:
        if member.is_finished and member.out is not None:
            results[member.task.name] = finished_result(member, member.out, keep_predictions=keep_predictions)
            continue
        behind = None if progress is None else _FurtherOn(progress, done)
        with member.open_folder() as folder:
            results[member.task.name] = evaluate_prepared(
                member, folder, model, progress=behind, keep_predictions=keep_predictions
            )
        done += member.total
    found = GroupResult(group.group.name, results, group.group.metric)
    if group.is_kept and group.out is not None:
        found.write(group.out)
    return found


def finished_group(group: PreparedGroup) -> GroupResult | None:
    """Return the result of a group all of whose tasks are finished in its folder; None where one is not.

    Raises RunFolderError, MachineError.
    """
    if group.out is None or not all(member.is_finished for member in group.members):
        return None
    results = {
        member.task.name: finished_result(member, member.out) for member in group.members if member.out is not None
    }
    found = GroupResult(group.group.name, results, group.group.metric)
    if not (group.out / "group.json").is_file():  # a run that ended right before it
        found.write(group.out)
    return found


class _FurtherOn:
    """Tells a progress of a group's task what was done in those before it, too."""

    def __init__(self, progress: Progress, done: int):
        self._progress = progress
        self._done = done

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None:
        self._progress.update(self._done + done, retries, servers, message=message)

    def waiting(self, message: str) -> None:
        self._progress.waiting(message)


def evaluate_prepared(
    prepared: Prepared,
    folder: RunFolder,
    model: "RemoteModel",
    *,
    progress: Progress | None = None,
    keep_predictions: bool = False,
) -> RunResult:
    """Score what is prepared over a model's swarm, and write what came of it into the run's folder.

    keep_predictions: whether the result holds every prediction; the folder does in any case.

    Raises as `evaluate` does.
    """
    retries_before = model.blocks.status().retries
    scoring = Scoring(prepared, folder, model, progress)
    with _told_what_is_kept(scoring, kept=prepared.is_kept):
        for note in prepared.notes:
            scoring.say(f"note: {note}")
        if folder.resumed:
            scoring.say_what_is_left()
        note_sample(prepared, folder, model, on_tick=scoring.tick)
        while True:
            scoring.score_all()
            if not prepared.no_noise:
                note_noise(prepared, folder, model, on_tick=scoring.tick)
            if not scoring.withdrawn:  # otherwise a server was caught by then, and what it had computed is not counted
                break
        retries = model.blocks.status().retries - retries_before
        result = _result(prepared, folder, retries=retries, keep_predictions=keep_predictions)
        finish(folder, result)
    return result


def finished_result(prepared: Prepared, path: Path, *, keep_predictions: bool = False) -> RunResult:
    """Return the result of what is prepared from the folder that holds it, finished.

    keep_predictions: as `evaluate_prepared` has it. Raises RunFolderError, MachineError.
    """
    with RunFolder.open(path) as folder:
        return _result(prepared, folder, retries=folder.noted_retries(), keep_predictions=keep_predictions)


def _result(prepared: Prepared, folder: RunFolder, *, retries: int, keep_predictions: bool = False) -> RunResult:
    task = prepared.task
    result = run_result(
        folder.manifest,
        folder.journal,
        task=task.name,
        metrics=task.metrics,
        label_names=task.label_names,
        retries=retries,
        keep_predictions=keep_predictions,
        with_texts=folder.with_texts,
    )
    return replace(result, source=RowSource(task, prepared.part)) if keep_predictions else result


def finish(folder: RunFolder, result: RunResult) -> None:
    """Write what came of a run, the report too, and mark it as finished. Raises MachineError."""
    from petals_eval.report import markdown_report  # not above: it imports rich, which draws a random number

    folder.finish(result, report=markdown_report(result, folder.manifest, folder.journal.servers()))


@contextlib.contextmanager
def _told_what_is_kept(scoring: Scoring, *, kept: bool) -> Iterator[None]:
    """Whatever ends a run early, say how much of it is scored and how to go on."""
    try:
        yield
    except (PetalsEvalError, KeyboardInterrupt) as error:
        told = InterruptedRunError("interrupted") if isinstance(error, KeyboardInterrupt) else error
        scored = 0
        if kept:
            with contextlib.suppress(MachineError):  # a disk that takes no more may still be read, or not
                scored = scoring.folder.journal.committed() if isinstance(error, MachineError) else scoring.scored()
        if scored:
            # A mistake of the caller's would come back; whatever else ends a run, time or another swarm may help.
            again = "Run the same command again to go on."
            if scoring.prepared.out is None:  # which would begin a new folder
                again = f"To go on, run it again with --out {scoring.folder.path} (out=... in Python)."
            how = "" if isinstance(error, CallerError) else f" {again}"
            told.add_note(f"  {scored} of {scoring.total} examples are scored and kept in {scoring.folder.path}.{how}")
        raise told from error.__cause__
