"""What `run` and `demo` share: prepare, evaluate with progress shown, print what came of it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from petals_eval.cli.open_swarm import open_model
from petals_eval.cli.steps import step
from petals_eval.cli.streams import json_text
from petals_eval.config import ResultSettings, RunSettings
from petals_eval.errors import MachineError

if TYPE_CHECKING:
    from petals_eval.evaluation.groups import PreparedGroup
    from petals_eval.evaluation.prepare import Prepared
    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel
    from petals_eval.runs import GroupResult, Manifest, RunResult
    from petals_eval.runs.thresholds import Threshold
    from petals_eval.tracking import Tracker

__all__ = ["draw_page", "execute", "show_group", "show_result"]

_FINISHED = "this run is finished in {folder}: nothing is sent, its result is shown"


def execute(read_settings: Callable[[], RunSettings]) -> int:
    """Do what the settings say and print the result on stdout; everything on the way goes to stderr.

    read_settings: called once a person was told that something happens: checking an address takes imports.
    """
    with step("reading the task, the data, the prompts and the model's part at home"):
        settings = read_settings()

        from petals_eval.evaluation.evaluate import evaluate_prepared, finished_result
        from petals_eval.evaluation.groups import PreparedGroup, prepare_group_run
        from petals_eval.evaluation.prepare import prepare_run
        from petals_eval.report import ProgressDisplay
        from petals_eval.tasks import load_group
        from petals_eval.tracking import log_results, trackers_of

        trackers = trackers_of(settings.log_to)
        group = load_group(settings.task)
        prepared = prepare_run(settings) if group is None else prepare_group_run(settings, group)
    if isinstance(prepared, PreparedGroup):
        return _execute_group(settings, prepared, trackers)
    if settings.dry_run:
        from petals_eval.cli.dry_run import show_dry_run

        return show_dry_run(settings, prepared)
    if prepared.is_finished and prepared.out is not None:
        _say(_FINISHED.format(folder=prepared.out))
        result = finished_result(prepared, prepared.out)
        code = show_result(result, prepared.out, prepared.thresholds, settings)
        log_results(trackers, [(result, prepared.manifest)], say=_say)  # it may have failed the first time
        return code
    # The folder last: an end at once, which leaves no time to tidy up, leaves none before there is something in it.
    with open_model(settings, prepared) as model, prepared.open_folder() as folder:
        task, examples = prepared.task.name, len(prepared.part)
        _say(f"{_prompts_text(prepared.side.adapters)} · task {task} · {examples:,} examples")
        _say_estimate(settings, model, [prepared])
        with ProgressDisplay(prepared.total) as progress:
            result = evaluate_prepared(prepared, folder, model, progress=progress)
    code = show_result(result, folder.path, prepared.thresholds, settings)
    draw_page(settings, folder.path)
    log_results(trackers, [(result, folder.manifest)], say=_say)
    return code


def _execute_group(settings: RunSettings, prepared: "PreparedGroup", trackers: "Sequence[Tracker]") -> int:
    """Do what the settings say for each task of a group."""
    from petals_eval.evaluation.evaluate import evaluate_group, finished_group
    from petals_eval.report import ProgressDisplay
    from petals_eval.tracking import log_results

    if settings.dry_run:
        from petals_eval.cli.dry_run import show_group_dry_run

        return show_group_dry_run(settings, prepared)
    thresholds = {member.task.name: member.thresholds for member in prepared.members}
    finished_before = finished_group(prepared)
    if finished_before is not None:
        _say(_FINISHED.format(folder=prepared.out))
        code = show_group(finished_before, prepared.out, thresholds, settings)
        log_results(trackers, _with_manifests(finished_before, prepared), say=_say)
        return code
    with open_model(settings, prepared) as model:
        begun = prepared.in_folder()
        left = [member for member in begun.members if not member.is_finished]
        finished = f", {len(begun.members) - len(left)} of them finished" if len(left) < len(begun.members) else ""
        name = prepared.group.name
        _say(f"{_prompts_text(prepared.side.adapters)} · group {name} · {len(begun.members)} tasks{finished}")
        _say_estimate(settings, model, left)
        with ProgressDisplay(begun.total) as progress:
            result = evaluate_group(begun, model, progress=progress)
    code = show_group(result, begun.out, thresholds, settings)
    if begun.out is not None:
        draw_page(settings, begun.out, of_group=True)
    log_results(trackers, _with_manifests(result, begun), say=_say)
    return code


def _with_manifests(result: "GroupResult", group: "PreparedGroup") -> "list[tuple[RunResult, Manifest]]":
    return [(each, member.manifest) for each, member in zip(result.tasks.values(), group.members, strict=True)]


def draw_page(settings: ResultSettings, folder: Path, *, of_group: bool = False) -> None:
    """Draw what was shown already, and say where; a disk that takes no more changes no exit code."""
    from petals_eval.report.write import PAGE, write_page, write_pages

    try:
        if of_group:
            write_pages(folder)
        else:
            write_page(folder)
    except (MachineError, OSError) as error:  # matplotlib needs a folder for its fonts, too
        _say(f"note: there is no page of this run: {error}")
    else:
        typer.echo(f"report: {folder / '*' / PAGE if of_group else folder / PAGE}", err=settings.json_output)


def _say_estimate(settings: RunSettings, model: "RemoteModel", left: "Sequence[Prepared]") -> None:
    """Say how long it takes to score what is left; not on an embedded swarm, whose claims are made up."""
    from petals_eval.evaluation.estimate import (
        estimate_generation,
        estimate_run,
        expected_new_tokens,
        expected_positions,
    )

    if settings.local_swarm is not None or not left:
        return
    _say(estimate_run(model.blocks.snapshot, sum(map(expected_positions, left))))
    if new_tokens := sum(map(expected_new_tokens, left)):
        _say(estimate_generation(model.blocks.snapshot, new_tokens))


def show_result(result: "RunResult", folder: Path, thresholds: "Sequence[Threshold]", settings: ResultSettings) -> int:
    """Print the result, and on stderr which thresholds it missed. Returns the exit code: 1 where there is one."""
    from petals_eval.report import console_for, print_result
    from petals_eval.runs.thresholds import missed

    if settings.json_output:
        typer.echo(json_text(result.to_json(), indent=2))
        _say(f"run folder: {folder}")
    else:
        print_result(result, console_for(sys.stdout), folder=folder)
    lines = missed(result, thresholds, settings.max_failed)
    for line in lines:
        _say(line)
    return 1 if lines else 0


def show_group(
    result: "GroupResult",
    folder: Path | None,
    thresholds: "Mapping[str, Sequence[Threshold]]",
    settings: ResultSettings,
) -> int:
    """Print the results of a group's tasks, and on stderr which of each task's thresholds they missed.

    Returns the exit code: 1 where there is one.
    """
    from petals_eval.report import console_for, print_group
    from petals_eval.runs.thresholds import missed

    if settings.json_output:
        typer.echo(json_text(result.to_json(), indent=2))
        _say(f"run folders: {folder}")
    else:
        print_group(result, console_for(sys.stdout), folder=folder)
    lines = [
        f"{name}: {line}"
        for name, each in result.tasks.items()
        for line in missed(each, thresholds[name], settings.max_failed)
    ]
    for line in lines:
        _say(line)
    return 1 if lines else 0


def _prompts_text(adapters: "Sequence[Adapter]") -> str:
    """Describe the adapters, with their names where there are several to tell apart."""
    if not adapters:
        return "no prompts"
    if len(adapters) == 1:
        return f"prompts: {_shape(adapters[0])}"
    return "prompts: " + "; ".join(f"{adapter.name} ({_shape(adapter)})" for adapter in adapters)


def _shape(adapter: "Adapter") -> str:
    blocks = "" if adapter.deep_prompts is None else f" x {adapter.deep_prompts.shape[0]} blocks"
    task = "" if adapter.task is None else f", task {adapter.task}"
    return f"{adapter.kind}{task}, {adapter.prefix_length} tokens{blocks}"


def _say(message: str) -> None:
    typer.echo(message, err=True)
