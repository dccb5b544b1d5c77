"""`petals-eval run --dry-run`: show what a run would send and to whom; send nothing."""

from typing import TYPE_CHECKING

import typer

from petals_eval.cli.open_swarm import peers_of
from petals_eval.config import RunSettings, SwarmSettings
from petals_eval.errors import SwarmError
from petals_eval.text import plural

if TYPE_CHECKING:
    from petals_eval.evaluation.dry_run import DryRun
    from petals_eval.evaluation.prepare import Prepared

__all__ = ["show_dry_run"]

LOOK_SECONDS = 15.0  # a dry run works without a swarm, so it does not wait long for one


def show_dry_run(settings: RunSettings, prepared: "Prepared") -> int:
    """Print the first examples as the model would read them, what would be sent, and to which servers."""
    from petals_eval.evaluation.dry_run import dry_run

    for adapter in prepared.side.adapters or (None,):
        plan = dry_run(prepared, adapter)
        name = "no prompts" if adapter is None else adapter.name
        typer.echo(f"== {name}: the first examples as the model reads them")
        for example in plan.shown:
            typer.echo(f"{example}\n")
        typer.echo(_amounts(plan))
        for note in (*prepared.notes, *plan.notes):
            typer.echo(f"  note: {note}")
    typer.echo("== the servers that would be used first")
    for line in _route(settings, prepared):
        typer.echo(f"  {line}")
    typer.echo("nothing was sent")
    return 0


def _amounts(plan: "DryRun") -> str:
    cut = f" ({plural(plan.n_truncated, 'text')} cut)" if plan.n_truncated else ""
    deep = f", and {_size(plan.prompt_bytes)} of deep prompts over all hops" if plan.prompt_bytes else ""
    failed = f"\n  {plural(plan.n_failed, 'example')} cannot be computed: {plan.why_failed}" if plan.n_failed else ""
    return (
        f"would send {plural(plan.n_examples, 'example')}{cut} as {plural(plan.n_requests, 'request')} in "
        f"{plural(plan.n_micro_batches, 'micro-batch', 'micro-batches')}:\n"
        f"  {plural(plan.n_text_tokens, 'text token')}, {plural(plan.n_positions, 'position')} with prompts and "
        "padding\n"
        f"  {_size(plan.hidden_bytes)} of hidden states to each hop and as much back{deep}{failed}"
    )


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
            return route_lines(connection.remote_sequential(prepared.side.dht_prefix, num_blocks).snapshot)
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
