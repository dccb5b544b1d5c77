"""Workarounds for hivemind 1.1's libp2p daemon, which every call goes through."""

import asyncio
import errno
import re
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from anyio import CancelScope
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.environment import environment_defaults
from petals_eval.errors import MachineError
from petals_eval.swarm.transport.late_answers import keep_reading

__all__ = ["end_daemon", "start_daemon", "wait_until_lost"]

_GO = {"GOMAXPROCS": "1", "GOGC": "200"}
"""Environment variables of Go's runtime, unless the user has set them. The daemon only passes on messages of some
hundred KiB, and spent two fifths of its processor time on collecting them as garbage and on threads that look for work:
6.5 ms for each MB moved, 3.7 ms like this, on two cores, and 200 MB of memory, not 130."""


_SOCKET_PATH = 60
"""Characters that a folder's path may have: a socket's, with the file's name, has 107 at most (unix(7))."""
_OF_THIS_MACHINE = re.compile(
    "read-only file system|permission denied|operation not permitted|too many open files|no space left|quota exceeded"
    "|cannot allocate memory|resource temporarily unavailable|address already in use|p2pd binary",
    re.IGNORECASE,
)
"""What the daemon or the system says where it is not the swarm's fault that the daemon does not start."""


async def start_daemon(**options: Any) -> P2P:
    """Start a daemon as `P2P.create` does with these options, with a reader that late answers do not end.

    `dht_mode` may be "off", too.

    hivemind hands on the environment it finds: what other threads start meanwhile gets Go's variables too. Its sockets
    are where temporary files go, and not always in /tmp, which may be read-only.

    Raises MachineError where this machine cannot start it, or another program has its port; hivemind's and the system's
    errors otherwise.
    """
    _refuse_taken_ports(options.get("host_maddrs") or ())
    started: list[P2P] = []
    folder = tempfile.gettempdir()

    class Daemon(P2P):
        """Known from its first moment on: hivemind leaves one whose start fails or is cancelled to itself. The garbage
        collector then finds it after the end of the loop, which it still needs."""

        # "off": it asks nobody for addresses, and dials those alone that it is told.
        DHT_MODE_MAPPING = P2P.DHT_MODE_MAPPING | {"off": {}}

        if len(folder) <= _SOCKET_PATH:
            _UNIX_SOCKET_PREFIX = f"/unix{folder}/hivemind-"

        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    try:
        with environment_defaults(_GO):
            p2p = await Daemon.create(**options)
    except BaseException as error:
        with CancelScope(shield=True):
            for each in started:
                await _kill(each)
        if isinstance(error, OSError | P2PDaemonError) and (reason := _OF_THIS_MACHINE.search(str(error))):
            raise MachineError(
                f"this machine cannot start the libp2p daemon (p2pd), through which the swarm is reached: {reason[0]}. "
                "It needs to run the program that hivemind brings, some descriptors (`ulimit -n`) and sockets in "
                f"{folder} (TMPDIR). ({type(error).__name__}: {str(error)[:300]})"
            ) from error
        raise
    keep_reading(p2p)
    return p2p


def _refuse_taken_ports(maddrs: Sequence[str]) -> None:
    """Raise MachineError for a TCP port that another program listens at. The daemon would share it (SO_REUSEPORT), and
    each of the two be given connections that are meant for the other."""
    for maddr in map(Multiaddr, maddrs):
        try:
            name, family = next((kind, each) for kind, each in _FAMILIES.items() if kind in maddr)
            host, port = maddr[name], int(maddr["tcp"])
        except (StopIteration, LookupError):
            continue
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections that have just ended do not count, as a restart at the same port leaves some.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise MachineError(
                        f"the port {port} of {host} is taken: another program listens there. Choose another one, or "
                        "0 for any that is free."
                    ) from None
                raise MachineError(f"cannot listen at {maddr}: {error.strerror}.") from error


_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


async def wait_until_lost(p2p: P2P) -> None:
    """Return when the line to the daemon is broken: the daemon has ended, or what came from it cannot be read.

    From then on no call gets an answer, and hivemind raises nothing: whoever waits has to be told.
    """
    control = p2p._client.control
    await asyncio.wait({control._read_task, control._write_task}, return_when=asyncio.FIRST_COMPLETED)


async def end_daemon(p2p: P2P, timeout: float) -> None:
    """Shut the daemon down; kill it when it has not ended after `timeout` seconds."""
    try:
        await asyncio.wait_for(p2p.shutdown(), timeout)
    except TimeoutError:
        await _kill(p2p)


async def _kill(p2p: P2P) -> None:
    """Kill the daemon, if it runs, and wait until it has ended and what it said was read."""
    if p2p._child is not None:
        with suppress(ProcessLookupError):
            p2p._child.kill()
        await p2p._child.wait()
    if p2p._reader_task is not None:
        await asyncio.wait([p2p._reader_task])
