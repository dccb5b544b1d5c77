"""`petals-eval run --dry-run`: show what a run would send and to whom; send nothing."""

import json
from typing import TYPE_CHECKING

import typer

from petals_eval.cli.open_swarm import peers_of
from petals_eval.config import RunSettings, SwarmSettings
from petals_eval.errors import SwarmError
from petals_eval.text import plural

if TYPE_CHECKING:
    from petals_eval.evaluation.dry_run import DryRun, Generating
    from petals_eval.evaluation.groups import PreparedGroup
    from petals_eval.evaluation.prepare import Prepared

__all__ = ["show_dry_run", "show_group_dry_run"]

DRY_RUN_SCHEMA = 1
LOOK_SECONDS = 15.0  # a dry run works without a swarm, so it does not wait long for one
_NOUNS = {"perplexity": ("document", "window")}  # what a row and a request of it are called
_A = {"example": "an example", "document": "a document"}


def show_dry_run(settings: RunSettings, prepared: "Prepared") -> int:
    """Print the first examples as the model would read them, what would be sent, and to which servers; or all of it as
    JSON."""
    from petals_eval.evaluation.dry_run import dry_run

    if settings.json_output:
        return _echo_json({"schema_version": DRY_RUN_SCHEMA, **_as_json(settings, prepared)})
    for plan in (dry_run(prepared, adapter) for adapter in prepared.side.adapters or (None,)):
        typer.echo(f"== {plan.adapter or 'no prompts'}: the first examples as the model reads them")
        for example in plan.shown:
            typer.echo(f"{example}\n")
        typer.echo("\n".join(_amounts(plan, prepared.task.kind)))
        for note in (*prepared.notes, *plan.notes):
            typer.echo(f"  note: {note}")
    typer.echo("== the servers that would be used first")
    for line in _route(settings, prepared):
        typer.echo(f"  {line}")
    typer.echo("nothing was sent")
    return 0


def show_group_dry_run(settings: RunSettings, group: "PreparedGroup") -> int:
    """Print what `show_dry_run` prints of each task of a group."""
    if settings.json_output:
        tasks = [_as_json(settings, member) for member in group.members]
        return _echo_json({"schema_version": DRY_RUN_SCHEMA, "group": group.group.name, "tasks": tasks})
    for member in group.members:
        typer.echo(f"=== task {member.task.name}")
        show_dry_run(settings, member)
    return 0


def _as_json(settings: RunSettings, prepared: "Prepared") -> dict[str, object]:
    from petals_eval.evaluation.dry_run import dry_run

    return {
        "task": prepared.task.name,
        "kind": prepared.task.kind,
        "notes": list(prepared.notes),
        "adapters": [dry_run(prepared, adapter).to_json() for adapter in prepared.side.adapters or (None,)],
        "servers": _route(settings, prepared),
    }


def _echo_json(found: dict[str, object]) -> int:
    typer.echo(json.dumps(found, ensure_ascii=False))  # on one line: tokens would take one each
    return 0


def _amounts(plan: "DryRun", kind: str) -> list[str]:
    example, request = _NOUNS.get(kind, ("example", "request"))
    cut = f" ({plural(plan.n_truncated, 'text')} cut)" if plan.n_truncated else ""
    lines = [f"would send {plural(plan.n_examples, example)}{cut} as {plural(plan.n_requests, request)}"]
    if plan.n_micro_batches:
        lines[0] += f" in {plural(plan.n_micro_batches, 'micro-batch', 'micro-batches')}"
    lines[0] += ":"
    tokens, opening = plural(plan.n_text_tokens, "text token"), _opening_text(plan)
    if plan.n_micro_batches:
        tokens += f", {plural(plan.n_positions, 'position')} with prompts and padding"
    lines += [f"  {tokens}", *([f"  {opening}"] if opening else [])]
    if plan.n_targets:
        each = f", of up to {plural(plan.most_requests, request)} {_A[example]}" if plan.most_requests > 1 else ""
        lines.append(f"  {plural(plan.n_targets, 'token')} whose log-likelihood is wanted{each}")
    deep = f", and {_size(plan.prompt_bytes)} of deep prompts over all hops" if plan.prompt_bytes else ""
    if plan.n_micro_batches:
        lines.append(f"  {_size(plan.hidden_bytes)} of hidden states to each hop and as much back{deep}")
        deep = ""
    if plan.generating is not None:
        lines += _generating(plan.generating, deep)
    if plan.n_unlabelled:
        lines.append(f"  {plural(plan.n_unlabelled, example)} without a label: predicted, and in no metric")
    return lines + _failures(plan, example)


def _generating(texts: "Generating", deep: str) -> list[str]:
    return [
        f"  {plural(texts.n_new_tokens, 'new token')} at most, in sessions of up to "
        f"{plural(texts.longest_session, 'position')}: {plural(texts.session_positions, 'position')}, "
        f"{_size(texts.session_bytes)} of hidden states to each hop and as much back{deep}",
        f"  where no server opens a session, a forward call a token: {plural(texts.forward_positions, 'position')}, "
        f"{_size(texts.forward_bytes)}",
    ]


def _opening_text(plan: "DryRun") -> str:
    """Return how many beginning-of-text tokens stand in front; nothing where the tokenizer has none."""
    counts = plan.bos_tokens
    if not counts:
        return ""
    if len(counts) == 1:
        (count,) = counts
        return (
            f"{plural(count, 'beginning-of-text token')} in front of each text"
            if count
            else ("no beginning-of-text token in front of the texts")
        )
    each = ", ".join(f"{count} ({plural(requests, 'time')})" for count, requests in counts.items())
    return f"beginning-of-text tokens in front of a text: {each}"


def _failures(plan: "DryRun", example: str) -> list[str]:
    if not plan.n_failed:
        return []
    lines = [f"  {plural(plan.n_failed, example)} cannot be computed:"]
    lines += [f"    {example} {key}: {reason}" for key, reason in plan.failures]
    more = plan.n_failed - len(plan.failures)
    return lines + ([f"    and {more:,} more"] if more else [])


def _route(settings: RunSettings, prepared: "Prepared") -> list[str]:
    """Return a line for each hop of the route, or why there is none to be seen."""
    from petals_eval.evaluation.dry_run import route_lines
    from petals_eval.swarm import SwarmConnection

    num_blocks = prepared.side.local.num_blocks
    if settings.local_swarm is not None:
        from petals_eval.local_swarm.launcher import split_evenly

        # Not started: who they are is known without.
        spans = split_evenly(num_blocks, settings.local_swarm)
        return [f"blocks {span}  a server embedded on this machine" for span in spans]
    wanted = SwarmSettings.of(settings, initial_peers=peers_of(settings), startup_timeout=LOOK_SECONDS)
    try:
        with SwarmConnection.connect(wanted) as connection:
            return route_lines(prepared.side.blocks_on(connection).snapshot)
    except SwarmError as error:
        return ["the swarm could not be asked:", *str(error).splitlines()]


def _size(count: int) -> str:
    """
    >>> _size(950), _size(12_300), _size(4_560_000)
    ('950 bytes', '12.3 kB', '4.6 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
