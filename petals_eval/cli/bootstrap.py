"""`petals-eval bootstrap`: the node that servers and clients of a private swarm meet at, in the foreground."""

import contextlib
import time
from functools import partial
from typing import Annotated

import typer

from petals_eval.cli.address_flags import (
    LOOPBACK,
    Announce,
    Identity,
    Listen,
    PeersFile,
    checked_peers,
    kept_in_file,
    own_address,
)
from petals_eval.cli.steps import step

__all__ = ["HELP", "SHORT", "bootstrap"]

SHORT = "Run the node that a private swarm's members meet at."
HELP = """Run a bootstrap node of a private swarm until Ctrl-C, and print the addresses that others connect to.

It holds a part of the swarm's directory and no blocks. It opens no port on your router.

\b
The same address after a restart, for servers and clients on other machines:
  petals-eval bootstrap --listen /ip4/0.0.0.0/tcp/31330 --identity ./key
One of two, which know each other:
  petals-eval bootstrap --identity ./key --initial-peers /ip4/...
"""
_TIMEOUT = 30.0  # seconds to start, and to end
_POLL = 0.2  # seconds


def bootstrap(
    listen: Listen = LOOPBACK,
    announce: Announce = None,
    identity: Identity = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(metavar="MADDR...", help="Other nodes of the swarm. Default: it is the first.")
    ] = None,
    peers_file: PeersFile = None,
) -> int:
    with contextlib.ExitStack() as opened:
        with step("starting the node"):
            address = own_address(listen, announce, identity)
            others = checked_peers(initial_peers or [])

            from anyio.from_thread import start_blocking_portal
            from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

            from petals_eval.errors import MachineError
            from petals_eval.local_swarm.peer import Peer

            portal = opened.enter_context(start_blocking_portal("asyncio", name="bootstrap node"))
            try:
                peer = portal.start_task_soon(partial(Peer.open, others, **address)).result(_TIMEOUT)
            except (P2PDaemonError, TimeoutError) as error:
                where = " and ".join([f"to listen at {listen}", *(f"to join {other}" for other in others)])
                raise MachineError(f"expected {where}; found: {type(error).__name__}: {error}") from error
        try:
            with kept_in_file(peers_file, peer.maddrs):
                for maddr in peer.maddrs:
                    typer.echo(f"--initial-peers {maddr}")
                typer.echo("Ctrl-C ends it.")
                while peer.is_alive:
                    time.sleep(_POLL)
            raise MachineError("the libp2p daemon ended by itself, so the bootstrap node was stopped.")
        except KeyboardInterrupt:
            typer.echo("stopping")
            return 0
        finally:
            portal.start_task_soon(peer.close).result(_TIMEOUT)
