"""`petals-eval run --dry-run`: show what a run would send and to whom; send nothing."""

from typing import TYPE_CHECKING

import typer

from petals_eval.cli.open_swarm import peers_of
from petals_eval.cli.steps import step
from petals_eval.cli.streams import json_text
from petals_eval.config import RunSettings, SwarmSettings
from petals_eval.errors import MissingBlocksError, SwarmError, SwarmUnreachableError
from petals_eval.text import plural

if TYPE_CHECKING:
    from petals_eval.evaluation.dry_run import DryRun, Generating, Route
    from petals_eval.evaluation.groups import PreparedGroup
    from petals_eval.evaluation.prepare import Prepared

__all__ = ["show_dry_run", "show_group_dry_run"]

DRY_RUN_SCHEMA = 1
LOOK_SECONDS = 15.0  # a dry run works without a swarm, so it does not wait long for one
_NOUNS = {"perplexity": ("document", "window")}  # what a row and a request of it are called
_A = {"example": "an example", "document": "a document"}


def show_dry_run(settings: RunSettings, prepared: "Prepared") -> int:
    """Print the first examples as the model would read them, what would be sent, and to which servers; or all of it as
    JSON. Returns the exit code: that of a swarm that cannot where it is not there or lacks blocks."""
    route = _look(settings, prepared)
    if settings.json_output:
        _echo_json(_as_json(prepared, route))
    else:
        _show(prepared, route)
    return 0 if route.is_complete else SwarmError.exit_code


def show_group_dry_run(settings: RunSettings, group: "PreparedGroup") -> int:
    """Print what `show_dry_run` prints of each task of a group, and return the exit code."""
    route = _look(settings, group.members[0])  # the same for all of them
    if settings.json_output:
        tasks = [_as_json(member, route) for member in group.members]
        _echo_json({"group": group.group.name, "tasks": tasks})
    else:
        for member in group.members:
            typer.echo(f"=== task {member.task.name}")
            _show(member, route)
    return 0 if route.is_complete else SwarmError.exit_code


def _show(prepared: "Prepared", route: "Route") -> None:
    from petals_eval.evaluation.dry_run import dry_run

    for plan in (dry_run(prepared, adapter) for adapter in prepared.side.adapters or (None,)):
        typer.echo(f"== {plan.adapter or 'no prompts'}: the first examples as the model reads them")
        for example in plan.shown:
            typer.echo(f"{example}\n")
        typer.echo("\n".join(_amounts(plan, prepared.task.kind)))
        for note in (*prepared.notes, *plan.notes):
            typer.echo(f"  note: {note}")
    typer.echo("== the servers that would be used first")
    for line in route.lines:
        typer.echo(f"  {line}")
    typer.echo("nothing was sent")


def _as_json(prepared: "Prepared", route: "Route") -> dict[str, object]:
    from petals_eval.evaluation.dry_run import dry_run

    return {
        "task": prepared.task.name,
        "kind": prepared.task.kind,
        "notes": list(prepared.notes),
        "adapters": [dry_run(prepared, adapter).to_json() for adapter in prepared.side.adapters or (None,)],
        "servers": list(route.lines),
        "is_reachable": route.is_reachable,
        "missing_blocks": [list(span) for span in route.missing],
    }


def _echo_json(found: dict[str, object]) -> None:
    typer.echo(json_text({"schema_version": DRY_RUN_SCHEMA, **found}))  # on one line: tokens would take one each


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


def _look(settings: RunSettings, prepared: "Prepared") -> "Route":
    """Return who would compute, by what the swarm says of itself now."""
    from petals_eval.evaluation.dry_run import Route, route_of
    from petals_eval.swarm import SwarmConnection

    num_blocks = prepared.side.local.num_blocks
    if settings.local_swarm is not None:
        from petals_eval.local_swarm.launcher import split_evenly

        # Not started: who they are is known without.
        spans = split_evenly(num_blocks, settings.local_swarm)
        return Route(tuple(f"blocks {span}  a server embedded on this machine" for span in spans))
    wanted = SwarmSettings.of(settings, initial_peers=peers_of(settings), startup_timeout=LOOK_SECONDS)
    try:
        with (
            step(f"looking up who serves {prepared.side.dht_prefix}"),
            SwarmConnection.connect(wanted) as connection,
        ):
            return route_of(prepared.side.blocks_on(connection).snapshot)
    except SwarmUnreachableError as error:
        return Route(("the swarm could not be asked:", *str(error).splitlines()), is_reachable=False)
    except MissingBlocksError as error:
        return Route((str(error),), missing=error.missing)
    except SwarmError as error:  # it says why nobody there has a block of this model
        return Route(tuple(str(error).splitlines()), missing=((0, num_blocks),))


def _size(count: int) -> str:
    """
    >>> _size(950), _size(12_300), _size(4_560_000)
    ('950 bytes', '12.3 kB', '4.6 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
