"""`petals-eval modes`: what eval mode and the absence of gradients change."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from petals_eval.cli.flags import flags_of
from petals_eval.cli.steps import step
from petals_eval.cli.streams import json_text
from petals_eval.errors import ConfigError
from petals_eval.text import printable
from petals_eval.two_modes.settings import ModesSettings

if TYPE_CHECKING:
    from petals_eval.two_modes.compare import Modes

__all__ = ["HELP", "SHORT", "modes"]

SHORT = "See what training mode would change."
HELP = """Answer one text several times in training mode and in eval mode: which modules differ, how far the answers do,
and what gradients cost. With tuned prompts and a task, also what the accuracy would have been had eval() been
forgotten. Or ask the servers of a swarm the same thing twice: nothing on them calls eval().

\b
  petals-eval modes --model ./my-classifier
  petals-eval modes --model ./my-llama --adapter ./prompts --task ./reviews.yaml --limit 100
  petals-eval modes --initial-peers /ip4/... --dht-prefix my-llama

Exit code 1: answers in eval mode differ, or a server runs its blocks in training mode. In Python: petals_eval.modes.
"""


@flags_of(ModesSettings)
def modes(**flags: Any) -> int:
    if ("model" in flags) == ("initial_peers" in flags):
        raise ConfigError("expected either --model, whose blocks run here, or --initial-peers of a swarm")
    if "initial_peers" in flags:
        return _of_swarm(flags)
    return _on_task(flags) if flags.keys() & {"adapter", "task", "data", "limit", "dropout"} else _of_model(flags)


def _of_model(flags: dict[str, Any]) -> int:
    with step("reading the model"):
        settings = ModesSettings(**flags)

        from petals_eval.two_modes.at_home import model_and_input
        from petals_eval.two_modes.compare import modes as compare_modes
        from petals_eval.two_modes.terminal import lines_of

        model, inputs = model_and_input(str(settings.model), settings.revision, settings.text)
    found = compare_modes(model, inputs, answers=settings.answers, seed=settings.seed)
    labels = getattr(model.config, "id2label", None) or {} if "Classification" in type(model).__name__ else {}
    names = [str(labels.get(number, number)) for number in range(len(labels))]
    if settings.json_output:
        typer.echo(json_text(found.to_json(), indent=2))
    else:
        for line in lines_of(found, names):
            typer.echo(line)
    _write_page(settings, {Path(str(settings.model)).name: found}, names)
    return 0 if found.is_deterministic else 1


def _on_task(flags: dict[str, Any]) -> int:
    with step("reading the task, the data, the prompts and the model"):
        settings = ModesSettings(**flags)

        from petals_eval.two_modes.at_home import on_task
        from petals_eval.two_modes.compare import modes as compare_modes
        from petals_eval.two_modes.terminal import lines_of

        asked = on_task(settings)
    found = {}
    for name, model in asked.models.items():
        with step(f"answering in both modes: {printable(name)}"):
            modes_of_it = compare_modes(
                model, asked.input_ids, answers=settings.answers, seed=settings.seed, batches=asked.batches
            )
        found[name] = replace(modes_of_it, half_precision=model.saved_in_half)
    if settings.json_output:
        typer.echo(json_text({"adapters": {name: each.to_json() for name, each in found.items()}}, indent=2))
    else:
        for name, each in found.items():
            typer.echo(f"{printable(name)}:")
            for line in lines_of(each, asked.label_names):
                typer.echo(f"  {line}")
    _write_page(settings, found, asked.label_names)
    return 0 if all(each.is_deterministic for each in found.values()) else 1


def _write_page(settings: ModesSettings, found: "Mapping[str, Modes]", label_names: Sequence[str]) -> None:
    if settings.out is None:
        return
    from petals_eval.runs.disk import write_atomically
    from petals_eval.two_modes.page import modes_page

    write_atomically(Path(settings.out), [modes_page(Path(str(settings.model)).name, found, label_names)])
    typer.echo(f"report: {settings.out}", err=settings.json_output)


def _of_swarm(flags: dict[str, Any]) -> int:
    if "out" in flags:
        raise ConfigError("--out: expected --model; petals-eval health --html FILE draws the page of a swarm.")
    with step("asking each server the same thing twice"):
        settings = ModesSettings(**flags)

        from petals_eval.health import check_health
        from petals_eval.health.settings import Level
        from petals_eval.two_modes.terminal import server_lines

        report = check_health(settings.initial_peers, models=settings.models, level=Level.FORWARD)
    if settings.json_output:
        typer.echo(json_text(report.to_json(), indent=2))
    else:
        for line in server_lines(report):
            typer.echo(line)
    servers = [server for model in report.models for server in model.servers]
    return int(any(each.name == "nondeterministic" for server in servers for each in server.findings))
