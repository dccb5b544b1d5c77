"""What `run` and `demo` share: open, evaluate with progress shown, print what came of it."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from petals_eval.cli.opening import chosen_swarm, local_options, open_model
from petals_eval.config import RunSettings
from petals_eval.errors import SwarmError

if TYPE_CHECKING:
    from petals_eval.data import DataSource
    from petals_eval.tasks import Task

__all__ = ["default_folder", "execute"]


def execute(settings: RunSettings) -> int:
    """Do what the settings say and print the result on stdout; everything on the way goes to stderr."""
    from petals_eval.tasks import load_task

    # Mistakes in the task and its data show before a swarm is started or asked.
    task = load_task(settings.task)
    if settings.max_length is not None:
        task = task.model_copy(update={"max_length": settings.max_length})  # type: ignore[attr-defined]
    source = _source(settings, task)
    if settings.dry_run:
        return _show_dry_run(settings, task, source)
    return _evaluate(settings, task, source)


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
    from petals_eval.data import load_rows
    from petals_eval.evaluator import evaluate
    from petals_eval.report import ProgressDisplay, console_for, print_result

    n_rows = len(load_rows(source))
    n_examples = min(n_rows, settings.limit or n_rows)
    variants = max(1, len(settings.adapter)) + bool(settings.without_prompts and settings.adapter)
    out = Path(settings.out) if settings.out else default_folder(task.name)
    with open_model(settings) as model:
        _say(f"{_adapters_line(model)} · task {task.name} · {n_examples} examples")
        with ProgressDisplay(n_examples * variants) as progress:
            result = evaluate(
                model,
                task=task,
                data=source,
                limit=settings.limit,
                seed=settings.seed,
                without_prompts=settings.without_prompts,
                out=out,
                tokens_per_micro_batch=settings.tokens_per_micro_batch,
                progress=progress,
            )
    if settings.json_output:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
        _say(f"run folder: {out}")
    else:
        print_result(result, console_for(sys.stdout), folder=out)
    return 0


def _show_dry_run(settings: RunSettings, task: "Task", source: "DataSource") -> int:
    from petals_eval.data import load_rows, sample
    from petals_eval.dry_run import dry_run
    from petals_eval.remote_model import load_local

    local, adapters = load_local(settings.model, settings.adapter, **local_options(settings))
    rows = sample(load_rows(source), settings.limit, settings.seed)
    for adapter in adapters or (None,):
        plan = dry_run(local, adapter, task, rows, tokens_per_micro_batch=settings.tokens_per_micro_batch)
        typer.echo(
            f"== {'no prompts' if adapter is None else adapter.name}: the first examples as the model reads them"
        )
        for example in plan.shown:
            typer.echo(example + "\n")
        cut = f", {plan.n_truncated} of them cut" if plan.n_truncated else ""
        typer.echo(
            f"would send {plan.n_examples} examples{cut}: {plan.n_requests} requests in {plan.n_micro_batches} "
            f"micro-batches, {plan.n_text_tokens} text tokens, {plan.n_positions} positions with prompts and padding;\n"
            f"to each hop {_megabytes(plan.hidden_bytes)} of hidden states and as much back, "
            f"and {_megabytes(plan.prompt_bytes)} of deep prompts in all"
        )
    typer.echo("== the servers that would be used first")
    for line in _route(settings, local.num_blocks):
        typer.echo(f"  {line}")
    typer.echo("nothing was sent")
    return 0


def _route(settings: RunSettings, num_blocks: int) -> list[str]:
    """The route, or why there is none to be seen: a dry run works without a swarm, too."""
    from petals_eval.config import SwarmSettings
    from petals_eval.dry_run import route_lines
    from petals_eval.remote_model import default_dht_prefix, load_local
    from petals_eval.swarm import SwarmConnection

    try:
        with chosen_swarm(settings) as (initial_peers, dht_prefix):
            if dht_prefix is None:
                dht_prefix = default_dht_prefix(settings.model, load_local(settings.model)[0])
            swarm_settings = SwarmSettings(
                initial_peers=initial_peers, active_adapter=settings.active_adapter, startup_timeout=15.0
            )
            with SwarmConnection.connect(swarm_settings) as connection:
                return route_lines(connection.remote_sequential(dht_prefix, num_blocks).snapshot)
    except SwarmError as error:
        return ["the swarm could not be asked:", *str(error).splitlines()]


def default_folder(name: str) -> Path:
    """runs/<name>-<time>, one that does not exist yet."""
    base = Path("runs") / f"{name}-{datetime.now():%Y-%m-%d-%H%M}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def _adapters_line(model: object) -> str:
    adapters = getattr(model, "adapters", ())
    if not adapters:
        return "no prompts"
    parts = []
    for adapter in adapters:
        depth = f" x {adapter.deep_prompts.shape[0]} blocks" if adapter.deep_prompts is not None else ""
        parts.append(f"{adapter.name} ({adapter.kind}, {adapter.prefix_length} tokens{depth})")
    return f"prompts: {', '.join(parts)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _say(message: str) -> None:
    typer.echo(message, err=True)
