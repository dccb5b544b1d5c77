"""`petals-eval swarm MODEL`: a local swarm in the foreground."""

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from petals_eval.cli.flags import flags_of
from petals_eval.cli.steps import step
from petals_eval.config import RunSettings
from petals_eval.text import plural

if TYPE_CHECKING:
    from petals_eval.local_swarm import LocalSwarm

__all__ = ["HELP", "SHORT", "swarm"]

SHORT = "Serve a model's blocks on this machine, for tests and trials."
HELP = """Serve a model's blocks on this machine until Ctrl-C, and print the peers to connect to.

It listens on the loopback address only, unless --listen says otherwise.

\b
Three servers, the blocks split evenly among them:
  petals-eval swarm ./my-llama --servers 3
Two servers that both hold block 3:
  petals-eval swarm ./my-llama --span 0:4 --span 3:6
One server of another swarm, the same one after a restart:
  petals-eval swarm ./my-llama --span 0:2 --initial-peers /ip4/... \\
      --listen /ip4/0.0.0.0/tcp/31331 --identity ./server.key
"""


@flags_of(RunSettings, only=("revision", "token"))
def swarm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")],
    servers: Annotated[
        int, typer.Option(metavar="N", help="Servers; the blocks are split evenly among them.", min=1)
    ] = 3,
    span: Annotated[
        list[str] | None,
        typer.Option(metavar="FIRST:LAST", help="Blocks of one server, once per server, instead of --servers."),
    ] = None,
    dht_prefix: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name to announce. Default: by the model's name.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16. Default: the checkpoint's.")
    ] = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(metavar="MADDR", help="Join the swarm of these peers. Default: a new one.")
    ] = None,
    listen: Listen = LOOPBACK,
    announce: Announce = None,
    identity: Identity = None,
    peers_file: PeersFile = None,
    **flags: Any,
) -> int:
    count = len(span) if span else servers
    with contextlib.ExitStack() as opened:
        started: list[Any] = []

        def how_far() -> str:
            serving = sum(1 for each in started for server in each.servers if server.peer_id)
            return f"{serving} of {count} serve"

        with step(f"starting {plural(count, 'server')} of {model}", how_far):
            from petals_eval.errors import MachineError
            from petals_eval.local_swarm import LocalSwarm

            running = LocalSwarm(
                model,
                servers=servers,
                spans=_spans(span) if span else None,
                dht_prefix=dht_prefix,
                initial_peers=checked_peers(initial_peers or []),
                dtype=dtype,
                **flags,
                **_address_of_one(count, listen, announce, identity),
            )
            started.append(running)
            opened.enter_context(running)
        typer.echo(f"serving {_served(running)} as {running.dht_prefix}:")
        for server in running.servers:
            typer.echo(f"  blocks {server.span}  {server.peer_id}")
        typer.echo("connect with:")
        typer.echo(
            f"  petals-eval run --model {shlex.quote(model)} --dht-prefix {running.dht_prefix} "
            f"--initial-peers {running.initial_peers[0]} --task TASK --adapter PROMPTS"
        )
        typer.echo("Ctrl-C ends it.")
        try:
            with kept_in_file(peers_file, running.initial_peers):
                ended = running.wait()
        except KeyboardInterrupt:
            typer.echo("stopping")
            return 0
    raise MachineError(
        f"the server of blocks {ended.span} ({ended.peer_id}) ended by itself, so the swarm was stopped."
    )


def _served(running: "LocalSwarm") -> str:
    """Return how many blocks the servers hold, and which of the model's nobody here does."""
    from petals_eval.swarm.wire.span import joined, spans_text

    held = {block for server in running.servers for block in range(server.span.start, server.span.stop)}
    if len(held) == running.num_blocks:
        return plural(len(held), "block")
    missing = joined(block for block in range(running.num_blocks) if block not in held)
    return f"{len(held)} of {plural(running.num_blocks, 'block')} (none of these servers holds {spans_text(missing)})"


def _address_of_one(servers: int, listen: str, announce: str | None, identity: Path | None) -> dict[str, Any]:
    from petals_eval.errors import ConfigError

    if servers > 1 and (announce is not None or identity is not None or not listen.endswith("/tcp/0")):
        raise ConfigError(
            f"a port of --listen, --announce and --identity are one server's, found {servers} servers: give one --span"
        )
    return own_address(listen, announce, identity)


def _spans(texts: list[str]) -> list[tuple[int, int]]:
    from petals_eval.errors import ConfigError

    try:
        return [(int(first), int(last)) for first, last in (text.split(":") for text in texts)]
    except ValueError:
        raise ConfigError(f"--span: expected FIRST:LAST such as 0:4, found {' '.join(texts)}") from None
