"""The flags of commands that other machines connect to: where they listen, and who they are."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.config import checked_peers

__all__ = ["LOOPBACK", "Announce", "Identity", "Listen", "PeersFile", "checked_peers", "kept_in_file", "own_address"]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"

Listen = Annotated[
    str,
    typer.Option(metavar="MADDR", help="Where it listens. Default: loopback, a free port.", show_default=False),
]
Announce = Annotated[
    str | None,
    typer.Option(metavar="MADDR", help="Where others are told to connect, if that is not where it listens."),
]
Identity = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Key of its identity, made if missing. Default: a new one at each start."),
]
PeersFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the swarm's addresses there once all serve; removed at the end."),
]


def own_address(listen: str, announce: str | None, identity: Path | None) -> dict[str, Any]:
    """Return what the flags say, as `Peer.open` and the servers' settings take it. Raises ConfigError."""
    from hivemind.utils.multiaddr import Multiaddr

    from petals_eval.errors import ConfigError

    for flag, maddr in (("--listen", listen), ("--announce", announce)):
        try:
            Multiaddr(maddr or LOOPBACK)["tcp"]
        except (ValueError, LookupError):
            raise ConfigError(
                f"{flag}: expected a multiaddress such as /ip4/0.0.0.0/tcp/31330, found {maddr}"
            ) from None
    if identity is not None and not identity.parent.is_dir():
        raise ConfigError(f"--identity: expected a file in a folder that is there, found {identity}")
    return {
        "host_maddrs": (listen,),
        "announce_maddrs": () if announce is None else (announce,),
        "identity_path": None if identity is None else str(identity),
    }


@contextlib.contextmanager
def kept_in_file(path: Path | None, maddrs: Sequence[str]) -> Iterator[None]:
    """Keep the swarm's addresses, one a line, in the file `path` while the block runs; with None do nothing."""
    from petals_eval.runs.disk import write_atomically

    if path is None:
        yield
        return
    write_atomically(path, [f"{maddr}\n" for maddr in maddrs])
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
