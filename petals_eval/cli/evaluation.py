"""What `run` and `demo` share: open, evaluate with progress shown, print what came of it."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from petals_eval.cli.open_swarm import local_options, open_model
from petals_eval.config import RunSettings
from petals_eval.errors import CallerError, ConfigError

if TYPE_CHECKING:
    from petals_eval.data import DataSource, Rows
    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel
    from petals_eval.runs import RunResult
    from petals_eval.runs.thresholds import Bar
    from petals_eval.tasks import Task

__all__ = ["execute", "show_result"]

_ROWS_FOR_OUTLOOK = 50


def execute(settings: RunSettings) -> int:
    """Do what the settings say and print the result on stdout; everything on the way goes to stderr."""
    # Mistakes in the task and its data show before a swarm is started or asked.
    task = _task(settings)
    source = _source(settings, task)
    if settings.dry_run:
        from petals_eval.cli.dry_run import show_dry_run

        return show_dry_run(settings, task, source)
    return _evaluate(settings, task, source)


def _task(settings: RunSettings) -> "Task":
    from petals_eval.tasks import ClassificationTask, load_task

    task = load_task(settings.task)
    if settings.max_length is None:
        return task
    if not isinstance(task, ClassificationTask):
        raise ConfigError(f"--max-length: task {task.name} has no max_length that could be changed")
    return task.model_copy(update={"max_length": settings.max_length})


def _source(settings: RunSettings, task: "Task") -> "DataSource":
    from petals_eval.tasks import resolve_source

    return resolve_source(
        task,
        settings.data,
        subset=settings.subset,
        split=settings.split,
        revision=settings.data_revision,
        token=settings.token,
    )


def _evaluate(settings: RunSettings, task: "Task", source: "DataSource") -> int:
    from petals_eval.data import load_rows, sample
    from petals_eval.evaluation.evaluate import evaluate
    from petals_eval.report import ProgressDisplay
    from petals_eval.runs import Shard
    from petals_eval.runs.thresholds import Bar

    local_options(settings)  # a device this machine lacks shows before a swarm is started
    bars = [Bar.parse(text, task.label_names) for text in settings.fail_under]
    task = _with_metrics(task, [bar.metric for bar in bars])
    rows = sample(load_rows(source), settings.limit, settings.seed)
    _check(task, rows)
    part = None if settings.shard is None else Shard.parse(settings.shard)
    n_examples = len(rows if part is None else part.of(rows))
    variants = max(1, len(settings.adapter)) + bool(settings.without_prompts and settings.adapter)
    suffix = "" if part is None else f"-{part.index}of{part.count}"
    out = Path(settings.out) if settings.out else _default_folder(f"{task.name}{suffix}")
    with open_model(settings) as model:
        _say(f"{_prompts_text(model.adapters)} · task {task.name} · {n_examples:,} examples")
        if settings.local_swarm is None:  # what an embedded swarm claims is made up
            _say_outlook(model, task, source, n_examples * variants)
        with ProgressDisplay(n_examples * variants) as progress:
            result = evaluate(
                model,
                task=task,
                data=source,
                limit=settings.limit,
                seed=settings.seed,
                shard=settings.shard,
                without_prompts=settings.without_prompts,
                out=out,
                tokens_per_micro_batch=settings.tokens_per_micro_batch,
                progress=progress,
            )
    return show_result(result, out, bars, max_failed=settings.max_failed, as_json=settings.json_output)


def show_result(result: "RunResult", folder: Path, bars: "Sequence[Bar]", *, max_failed: int, as_json: bool) -> int:
    """Print the result, and on stderr what is below a bar. Returns the exit code: 1 where something is."""
    from petals_eval.report import console_for, print_result
    from petals_eval.runs.thresholds import below

    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
        _say(f"run folder: {folder}")
    else:
        print_result(result, console_for(sys.stdout), folder=folder)
    missed = below(result, bars, max_failed)
    for line in missed:
        _say(line)
    return 1 if missed else 0


def _with_metrics(task: "Task", names: "Sequence[str]") -> "Task":
    """The task with these metrics computed, too."""
    from petals_eval.tasks import ClassificationTask

    if not names or not isinstance(task, ClassificationTask):
        return task
    return task.model_copy(update={"metrics": tuple(dict.fromkeys([*task.metrics, *names]))})


def _check(task: "Task", rows: "Rows") -> None:
    """Missing columns and wrong labels show before a swarm is started."""
    check = getattr(task, "check", None)
    if check is not None:
        check(rows)


def _say_outlook(model: "RemoteModel", task: "Task", source: "DataSource", n_examples: int) -> None:
    """One line: can the swarm do it, and how long will it take? Reckoned from the length of the first rows.

    n_examples: over all variants.
    """
    import numpy as np

    from petals_eval.data import load_rows
    from petals_eval.evaluation.estimate import outlook

    rows = load_rows(source)
    first = rows.at(np.arange(min(len(rows), _ROWS_FOR_OUTLOOK)))
    try:
        shown = list(task.examples(first, model.local.tokenizer))
    except CallerError:
        return  # a wrong row is the evaluation's to report
    prefix = max((adapter.prefix_length for adapter in model.adapters), default=0)
    requests = [request for example in shown for request in example.requests]
    positions = sum(len(request.input_ids) + prefix for request in requests) / max(1, len(shown))
    _say(outlook(model.blocks.snapshot, round(positions * n_examples)))


def _default_folder(name: str) -> Path:
    """runs/<name>-<time>, one that does not exist yet."""
    base = Path("runs") / f"{name}-{datetime.now():%Y-%m-%d-%H%M}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def _prompts_text(adapters: "tuple[Adapter, ...]") -> str:
    """Names only where there are several to tell apart."""
    if not adapters:
        return "no prompts"
    if len(adapters) == 1:
        return f"prompts: {_shape(adapters[0])}"
    return "prompts: " + "; ".join(f"{adapter.name} ({_shape(adapter)})" for adapter in adapters)


def _shape(adapter: "Adapter") -> str:
    blocks = "" if adapter.deep_prompts is None else f" x {adapter.deep_prompts.shape[0]} blocks"
    return f"{adapter.kind}, {adapter.prefix_length} tokens{blocks}"


def _say(message: str) -> None:
    typer.echo(message, err=True)
