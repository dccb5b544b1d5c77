"""The evaluation: from rows to a result, tied together."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from petals_eval.config import Place, Positive, Settings
from petals_eval.errors import CallerError, ConfigError, InterruptedRunError, MachineError, PetalsEvalError
from petals_eval.evaluation.prepare import Data, Prepared, prepare
from petals_eval.evaluation.scoring import Progress, Scoring
from petals_eval.evaluation.wire_error import note_sample
from petals_eval.remote_model import LocalSide
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.results import RunResult, run_result
from petals_eval.tasks import Task

if TYPE_CHECKING:
    import torch

    from petals_eval.remote_model import RemoteModel

__all__ = ["Progress", "check_progress", "evaluate", "evaluate_prepared", "finish", "is_remote_model"]


def evaluate(
    model: "RemoteModel | torch.nn.Module",
    *,
    task: str | Path | Mapping[str, Any] | Task,
    data: Data | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    unlabelled: Literal["error", "predict"] | None = None,
    without_prompts: bool = False,
    out: str | Path | None = None,
    tokens_per_micro_batch: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> RunResult:
    """Evaluate a model, with each of its adapters, on a task.

    model: a RemoteModel, or a Petals model with a head as it lives in a training loop: its embeddings, prompts and head
        as they are now, over our own connection to its swarm (`petals_eval.live_model`).
    task: a shipped task's name, a YAML file, a mapping of what such a file holds, or a Task object.
    data: a file, a hub name or a DataSource; rows: a list of mappings or any other iterable of them, a pandas DataFrame
        or a datasets.Dataset; None: the task's own.
    limit, seed: evaluate this many examples, drawn by the seed; the seed also draws the bootstrap of the intervals.
    shard: "2/3" evaluates the second of three parts; `petals_eval.merge` joins their run folders.
    unlabelled: "predict" rows that have no label, which are in no metric then; None: as the task says, which by default
        takes them for a mistake.
    without_prompts: evaluate the first adapter's head without its prompts, too.
    out: the run folder; an unfinished run of the same settings in it goes on. None: nothing is kept.
    tokenizer: for a Petals model; None: the one that lies with the model its config names.

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
    }
    _Values(**values)
    check_progress(progress)
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

        prepared = prepare(
            open_side,
            task=task,
            data=data,
            limit=limit,
            seed=seed,
            shard=shard,
            unlabelled=unlabelled,
            without_prompts=without_prompts,
            out=out,
            is_kept=out is not None,
            tokens_per_micro_batch=tokens_per_micro_batch,
        )
        folder = stack.enter_context(prepared.open_folder())
        if not is_remote:
            from petals_eval import live_model

            remote = live_model.connected(remote, prepared.side)
        return evaluate_prepared(prepared, folder, remote, progress=progress, keep_predictions=True)


class _Values(Settings):
    """The arguments of `evaluate` that are plain values, looked at before anything is read."""

    limit: int | None
    seed: int
    shard: str | None
    unlabelled: Literal["error", "predict"] | None
    without_prompts: bool
    out: Place | None
    tokens_per_micro_batch: Positive | None


def is_remote_model(model: object) -> bool:
    """Return whether this is a RemoteModel, or does what one does, and no live Petals model."""
    return all(hasattr(model, name) for name in ("local", "blocks", "compute"))


def check_progress(progress: object) -> None:
    """Raise ConfigError for what does not want to know how far an evaluation is."""
    if progress is not None and not all(callable(getattr(progress, name, None)) for name in ("update", "waiting")):
        raise ConfigError(
            "progress: expected an object with the methods update(done, retries, servers, message) and waiting(message)"
            f", found {type(progress).__name__}"
        )


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
    task = prepared.task
    retries_before = model.blocks.status().retries
    scoring = Scoring(prepared, folder, model, progress)
    with _told_what_is_kept(scoring, kept=prepared.is_kept):
        if folder.resumed:
            scoring.say_what_is_left()
        note_sample(prepared, folder, model, on_tick=scoring.tick)
        scoring.score_all()
        result = run_result(
            folder.manifest,
            folder.journal,
            task=task.name,
            metrics=task.metrics,
            label_names=task.label_names,
            retries=model.blocks.status().retries - retries_before,
            keep_predictions=keep_predictions,
        )
        finish(folder, result)
    return result


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
            how = "" if isinstance(error, CallerError) else " Run the same command again to go on."
            told.add_note(f"  {scored} of {scoring.total} examples are scored and kept in {scoring.folder.path}.{how}")
        raise told from error.__cause__
