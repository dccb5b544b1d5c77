"""Opening what a command works with: the swarm that its settings name, and the model over it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from petals_eval.cli.steps import step
from petals_eval.config import PUBLIC_SWARM, STRANGERS, RunSettings
from petals_eval.text import plural

if TYPE_CHECKING:
    from petals_eval.evaluation.groups import PreparedGroup
    from petals_eval.evaluation.prepare import Prepared
    from petals_eval.local_swarm import LocalSwarm
    from petals_eval.remote_model import RemoteModel

__all__ = ["open_model", "peers_of"]


@contextlib.contextmanager
def open_model(settings: RunSettings, prepared: "Prepared | PreparedGroup") -> "Iterator[RemoteModel]":
    """Connect what is prepared to the swarm of the settings; an embedded one is started, and runs until the end."""
    from petals_eval.remote_model import RemoteModel

    home = None
    if settings.verify_local is not None:  # before anything is started: their weights may not be there
        from petals_eval.model.blocks import BlockSpan

        start, stop = settings.verify_local
        with step(f"loading blocks {start}:{stop} here"):
            home = BlockSpan.load(settings.model, start, stop, revision=settings.revision, token=settings.hub_token)
    with contextlib.ExitStack() as opened:
        initial_peers = opened.enter_context(_swarm(settings, prepared.local_swarm))
        with step(f"connecting, and looking up who serves {prepared.side.dht_prefix}"):
            model = opened.enter_context(RemoteModel.connect(prepared.side, initial_peers, home))
        yield model


def peers_of(settings: RunSettings) -> Sequence[str]:
    """Return the bootstrap peers of a swarm that is not embedded; a person is told whose machines those are."""
    if settings.public_swarm:
        typer.echo(STRANGERS, err=True)
    return settings.initial_peers or PUBLIC_SWARM


@contextlib.contextmanager
def _swarm(settings: RunSettings, embedded: "LocalSwarm | None") -> Iterator[Sequence[str]]:
    if embedded is None:
        yield peers_of(settings)
        return
    with contextlib.ExitStack() as opened:
        servers = settings.local_swarm or 1

        def how_far() -> str:
            return f"{sum(1 for server in embedded.servers if server.peer_id)} of {servers} serve"

        with step(f"starting {plural(servers, 'server')} on this machine", how_far):
            swarm = opened.enter_context(embedded)
        spans = " ".join(str(server.span) for server in swarm.servers)
        count = plural(len(swarm.servers), "server")
        typer.echo(f"local swarm: {count}, blocks {spans}, peers {swarm.initial_peers[0]}", err=True)
        yield swarm.initial_peers
