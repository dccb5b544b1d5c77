"""An emulated network: relays before servers, each a link with delay, jitter and bandwidth, and one shared link of the
client's. TCP in, TCP out: any server will do, ours or a real Petals one, if it announces its relay's address.

Servers stand on a loopback address of their own, `SERVERS_HOST`, and libp2p dials from where it listens. So a relay
sees who calls: what comes from another server (its DHT traffic, its pushes) passes no link of the client's.

A link is a serial line: bytes leave it one after the other at its rate, then travel for its delay. What is sent faster
queues, and beyond `QUEUE_SECONDS` of queue the sender is held back, as a router's buffer would.
"""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from petals_eval.errors import MachineError

__all__ = ["EmulatedNetwork", "Link", "LinkProfile", "LinkUse", "Relay"]

SERVERS_HOST = "127.0.0.2"  # the client's connections come from 127.0.0.1
QUEUE_SECONDS = 0.05
CHUNK_SECONDS = 0.004  # of a link's time in one chunk: small enough that streams share a link fairly
SMALLEST_CHUNK, LARGEST_CHUNK = 4096, 65536  # bytes
_START_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A server's link.

    delay, jitter: seconds one way. up (towards the server), down: megabits per second; None: free.
    """

    delay: float = 0.0
    jitter: float = 0.0
    up: float | None = None
    down: float | None = None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a link carried: bytes, and the seconds it was busy with them (0 where it is free)."""

    bytes_up: int
    bytes_down: int
    busy_up: float
    busy_down: float

    def since(self, before: "LinkUse") -> "LinkUse":
        """What was carried after `before`."""
        return LinkUse(
            self.bytes_up - before.bytes_up,
            self.bytes_down - before.bytes_down,
            self.busy_up - before.busy_up,
            self.busy_down - before.busy_down,
        )


@dataclass(slots=True)
class Link:
    """One direction of a line. rate: bytes per second, None: free. Times are those of one clock, in seconds."""

    rate: float | None
    free_at: float = 0.0
    bytes: int = 0
    busy: float = 0.0

    def send(self, size: int, now: float) -> float:
        """When the last of `size` bytes has left, for bytes that arrive at the link's end at `now`.

        >>> link = Link(rate=1000.0)
        >>> link.send(500, now=10.0), link.send(500, now=10.0), link.send(500, now=20.0)
        (10.5, 11.0, 20.5)
        """
        self.bytes += size
        if self.rate is None:
            return now
        seconds = size / self.rate
        self.busy += seconds
        self.free_at = max(self.free_at, now) + seconds
        return self.free_at

    @property
    def chunk(self) -> int:
        """Bytes to hand over at once."""
        if self.rate is None:
            return LARGEST_CHUNK
        return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, int(self.rate * CHUNK_SECONDS)))


def _bytes_per_second(megabits: float | None) -> float | None:
    return None if megabits is None else megabits * 1e6 / 8


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

        with EmulatedNetwork(client_up=20) as network:
            relay = network.open_relay(LinkProfile(delay=0.02, up=100, down=100))
            ...                                     # start a server that announces relay.maddr
            network.connect(relay, server_port)

    client_up, client_down: megabits per second of the client's own link, shared by all relays; None: free.
    """

    def __init__(self, *, client_up: float | None = None, client_down: float | None = None, seed: int = 0):
        self._settings = {"client_up": client_up, "client_down": client_down, "seed": seed}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "EmulatedNetwork":
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(self._settings)
        return self

    def open_relay(self, profile: LinkProfile) -> Relay:
        """Listen on a free port. Connections wait until the relay is connected to its server."""
        answer = self._ask({"open": asdict(profile)})
        return Relay(int(answer["index"]), int(answer["port"]))

    def connect(self, relay: Relay, port: int, host: str = "127.0.0.1") -> None:
        """Tell a relay where its server listens."""
        self._ask({"connect": relay.index, "host": host, "port": port})

    def before_server(self, profile: LinkProfile) -> tuple[Relay, str]:
        """A relay before a server that has yet to start, and the address where that server must listen.

        It must announce `relay.maddr` alone: then nobody goes around the relay.
        """
        with socket.socket() as probe:
            probe.bind((SERVERS_HOST, 0))  # free now; nothing else on this machine picks ports of this address
            port = probe.getsockname()[1]
        relay = self.open_relay(profile)
        self.connect(relay, port, SERVERS_HOST)
        return relay, f"/ip4/{SERVERS_HOST}/tcp/{port}"

    def use(self) -> tuple[list[LinkUse], LinkUse]:
        """What each relay's link and the client's own carried since the start."""
        answer = self._ask({"use": True})
        return [LinkUse(*each) for each in answer["relays"]], LinkUse(*answer["client"])

    def processor_seconds(self) -> float:
        """What the relays cost so far: they share the machine with what is measured."""
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
            raise MachineError(f"the emulated network ended with exit code {process.wait(_START_TIMEOUT)}")
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
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass(slots=True, eq=False)
class _RelayEnd:
    """A relay as its process sees it."""

    profile: LinkProfile
    up: Link
    down: Link
    target: "asyncio.Future[tuple[str, int]]"
    server: asyncio.Server
    connections: set[asyncio.Task[None]] = field(default_factory=set)


class _Relays:
    """The relays' process."""

    def __init__(self, client_up: float | None, client_down: float | None, seed: int):
        self._client_up, self._client_down = Link(_bytes_per_second(client_up)), Link(_bytes_per_second(client_down))
        self._random = random.Random(seed)
        self._relays: list[_RelayEnd] = []

    async def answer(self, question: dict) -> dict:
        if "open" in question:
            return await self._open(LinkProfile(**question["open"]))
        if "connect" in question:
            self._relays[question["connect"]].target.set_result((question["host"], question["port"]))
            return {}
        return {
            "relays": [_use(relay.up, relay.down) for relay in self._relays],
            "client": _use(self._client_up, self._client_down),
            "processor": time.process_time(),
        }

    async def _open(self, profile: LinkProfile) -> dict:
        loop = asyncio.get_running_loop()
        up, down = Link(_bytes_per_second(profile.up)), Link(_bytes_per_second(profile.down))

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(relay, reader, writer))
            relay.connections.add(task)
            task.add_done_callback(relay.connections.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        relay = _RelayEnd(profile, up, down, loop.create_future(), server)
        self._relays.append(relay)
        port = server.sockets[0].getsockname()[1]
        return {"index": len(self._relays) - 1, "port": port}

    async def close(self) -> None:
        """End all connections."""
        for relay in self._relays:
            relay.server.close()
            for task in relay.connections:
                task.cancel()
            await asyncio.gather(*relay.connections, return_exceptions=True)

    async def _carry(self, relay: _RelayEnd, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = await relay.target
        try:
            server_reader, server_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        for each in (writer, server_writer):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            up, down = [relay.up], [relay.down]
            if writer.get_extra_info("peername")[0] != SERVERS_HOST:
                up, down = [self._client_up, relay.up], [relay.down, self._client_down]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, server_writer, up, relay.profile))
                group.create_task(self._pump(server_reader, writer, down, relay.profile))
        except* OSError:
            pass  # one side broke the connection; the other learns it by the close below
        finally:
            writer.close()
            server_writer.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, links: Sequence[Link], profile: LinkProfile
    ) -> None:
        """Carry one direction of a connection over its links."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(_deliver(queue, writer))
        chunk = min(link.chunk for link in links)
        due = 0.0
        try:
            while data := await reader.read(chunk):
                now = left = loop.time()
                for link in links:
                    left = link.send(len(data), left)
                # Jitter delays a chunk and all behind it: TCP delivers in order.
                due = max(due, left + profile.delay + profile.jitter * self._random.random())
                queue.put_nowait((due, data))
                if left - now > QUEUE_SECONDS:
                    await asyncio.sleep(left - now - QUEUE_SECONDS)
            queue.put_nowait((due, b""))
            await delivering
        finally:
            delivering.cancel()


async def _deliver(queue: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
    """Write each chunk when it is due; an empty one is the end of this direction."""
    loop = asyncio.get_running_loop()
    while True:
        due, data = await queue.get()
        wait = due - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        if not data:
            if not writer.is_closing():  # the other side may be gone already
                writer.write_eof()
            return
        if writer.is_closing():  # the other side is gone, and this with it
            return
        writer.write(data)
        await writer.drain()


def _use(up: Link, down: Link) -> tuple[int, int, float, float]:
    return up.bytes, down.bytes, up.busy, down.busy


async def _serve_questions() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    relays = _Relays(**json.loads(await reader.readline()))
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    while line := await reader.readline():
        answer = await relays.answer(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    await relays.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve_questions())
