"""An emulated network: relays before servers, each a link with delay, jitter and bandwidth, and one shared link of the
client's. TCP in, TCP out: any server will do, ours or a real Petals one, if it announces its relay's address.

Servers stand on a loopback address of their own, `SERVERS_HOST`, and libp2p dials from where it listens. So a relay
sees who calls: what comes from another server (its DHT traffic, its pushes) passes no link of the client's.

The relays run in a process of their own (`relays`), so that they take no time from the client that is measured.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from petals_eval.errors import MachineError

__all__ = ["SERVERS_HOST", "EmulatedNetwork", "LinkProfile", "LinkUse", "Relay"]

SERVERS_HOST = "127.0.0.2"  # the client's connections come from 127.0.0.1
_END_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A server's link.

    delay, jitter: seconds one way. up_mbps (towards the server), down_mbps: megabits per second; None: free.
    """

    delay: float = 0.0
    jitter: float = 0.0
    up_mbps: float | None = None
    down_mbps: float | None = None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a link carried: bytes, and the seconds it was busy with them (0 where it is free)."""

    bytes_up: int
    bytes_down: int
    busy_up: float
    busy_down: float

    def since(self, before: "LinkUse") -> "LinkUse":
        """Return what was carried after `before`."""
        return LinkUse(
            self.bytes_up - before.bytes_up,
            self.bytes_down - before.bytes_down,
            self.busy_up - before.busy_up,
            self.busy_down - before.busy_down,
        )


@dataclass(frozen=True, slots=True)
class Relay:
    """Where clients connect instead of the server: 127.0.0.1:port."""

    index: int
    port: int

    @property
    def maddr(self) -> str:
        """What the server announces as its own address, without its identity."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"


class EmulatedNetwork:
    """Relays in a process of their own, so that they take no time from the client that is measured.

        with EmulatedNetwork(client_up_mbps=20) as network:
            relay = network.open_relay(LinkProfile(delay=0.02, up_mbps=100, down_mbps=100))
            ...                                     # start a server that announces relay.maddr
            network.connect(relay, server_port)

    client_up_mbps, client_down_mbps: megabits per second of the client's own link, shared by all relays; None: free.
    """

    def __init__(self, *, client_up_mbps: float | None = None, client_down_mbps: float | None = None, seed: int = 0):
        self._settings = {"client_up_mbps": client_up_mbps, "client_down_mbps": client_down_mbps, "seed": seed}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "EmulatedNetwork":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "petals_eval.local_swarm.relays"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(self._settings)
        return self

    def open_relay(self, profile: LinkProfile) -> Relay:
        """Open a relay on a free port. Connections to it wait until it is connected to its server."""
        answer = self._ask({"open": asdict(profile)})
        return Relay(int(answer["index"]), int(answer["port"]))

    def connect(self, relay: Relay, port: int, host: str = "127.0.0.1") -> None:
        """Tell a relay where its server listens."""
        self._ask({"connect": relay.index, "host": host, "port": port})

    def before_server(self, profile: LinkProfile) -> tuple[Relay, str]:
        """Open a relay before a server that has yet to start; return the address, too, where that one must listen.

        The server must announce `relay.maddr` alone: then nobody goes around the relay.
        """
        with socket.socket() as probe:
            probe.bind((SERVERS_HOST, 0))  # free now; nothing else on this machine picks ports of this address
            port = probe.getsockname()[1]
        relay = self.open_relay(profile)
        self.connect(relay, port, SERVERS_HOST)
        return relay, f"/ip4/{SERVERS_HOST}/tcp/{port}"

    def use(self) -> tuple[list[LinkUse], LinkUse]:
        """Return what each relay's link and the client's own have carried since the start."""
        answer = self._ask({"use": True})
        return [LinkUse(*each) for each in answer["relays"]], LinkUse(*answer["client"])

    def processor_seconds(self) -> float:
        """Return the processor time of the relays so far: they share the machine with what is measured."""
        return float(self._ask({"use": True})["processor"])

    def _ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise MachineError("the emulated network is not running: use it as a context manager")
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise MachineError(f"the emulated network ended with exit code {process.wait(_END_TIMEOUT)}")
        return json.loads(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # it ends with its input
        try:
            process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
