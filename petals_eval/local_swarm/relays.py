"""The relays of an emulated network, in a process of their own.

A link is a serial line: bytes leave it one after the other at its rate, then travel for its delay. What is sent faster
queues, and beyond `MAX_QUEUE_SECONDS` of queue the sender is held back, as a router's buffer would.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from petals_eval.local_swarm.network import SERVERS_HOST, LinkProfile

__all__ = ["MAX_QUEUE_SECONDS", "Link"]

MAX_QUEUE_SECONDS = 0.05
CHUNK_SECONDS = 0.004  # of a link's time in one chunk: small enough that streams share a link fairly
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4096, 65536


@dataclass(slots=True)
class Link:
    """One direction of a line.

    rate: bytes per second; None: free. free_at: when it has sent all it was given, by the clock of its caller.
    bytes: what it was given. busy: seconds that it took to send that.
    """

    rate: float | None
    free_at: float = 0.0
    bytes: int = 0
    busy: float = 0.0

    def send(self, size: int, now: float) -> float:
        """Return when the last of `size` bytes has left, for bytes that come to the link at `now`.

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

    def sent_by(self, now: float) -> float:
        """Return the seconds that it has been sending by now: `busy` has what is in its queue, too."""
        return self.busy - max(0.0, self.free_at - now)

    @property
    def chunk(self) -> int:
        """Bytes that are read and handed on at once."""
        if self.rate is None:
            return MAX_CHUNK_BYTES
        return max(MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, int(self.rate * CHUNK_SECONDS)))


def _bytes_per_second(megabits: float | None) -> float | None:
    return None if megabits is None else megabits * 1e6 / 8


@dataclass(slots=True, eq=False)
class _RelayEnd:
    """A relay as its own process sees it. target: host and port of its server, once they are known."""

    profile: LinkProfile
    up: Link
    down: Link
    target: "asyncio.Future[tuple[str, int]]"
    server: asyncio.Server
    connections: set[asyncio.Task[None]] = field(default_factory=set)


class _Relays:
    """All relays, and the link that they share."""

    def __init__(self, client_up_mbps: float | None, client_down_mbps: float | None, seed: int):
        self._client_up = Link(_bytes_per_second(client_up_mbps))
        self._client_down = Link(_bytes_per_second(client_down_mbps))
        self._random = random.Random(seed)
        self._relays: list[_RelayEnd] = []

    async def answer(self, question: dict) -> dict:
        """Do what `EmulatedNetwork` asks, and return what it is told."""
        if "open" in question:
            return await self._open(LinkProfile(**question["open"]))
        if "connect" in question:
            self._relays[question["connect"]].target.set_result((question["host"], question["port"]))
            return {}
        return {
            "relays": [_link_use(relay.up, relay.down) for relay in self._relays],
            "client": _link_use(self._client_up, self._client_down),
            "processor": time.process_time(),
        }

    async def _open(self, profile: LinkProfile) -> dict:
        loop = asyncio.get_running_loop()
        up, down = Link(_bytes_per_second(profile.up_mbps)), Link(_bytes_per_second(profile.down_mbps))

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
                if left - now > MAX_QUEUE_SECONDS:
                    await asyncio.sleep(left - now - MAX_QUEUE_SECONDS)
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


def _link_use(up: Link, down: Link) -> tuple[int, int, float, float]:
    return up.bytes, down.bytes, up.busy, down.busy


async def _serve() -> None:
    """Answer questions, a line of JSON each, until the input ends. The first line has the settings."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    relays = _Relays(**json.loads(await reader.readline()))
    _say({})
    while line := await reader.readline():
        _say(await relays.answer(json.loads(line)))
    await relays.close()


def _say(answer: dict) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
