"""Simulated servers: they compute one call after the other at their pace, in virtual time, what can be reckoned here.

Block b of a simulated model takes the value v of a row to 3v + 7b + 1 modulo `MODULUS`, at every position alike. So an
answer shows which blocks ran, how often and in which order, and each value is exact in every dtype that servers compute
in.
"""

import asyncio
from functools import partial

import torch

from petals_eval.errors import PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.faults.switch import FaultSwitch
from petals_eval.local_swarm.relays import Link
from petals_eval.simulator.faults import MODULUS, Message, corrupted, tampered
from petals_eval.simulator.network import Direction
from petals_eval.simulator.scenario import Scenario, Server
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.wire.codecs import LossyCode
from petals_eval.swarm.wire.span import Span

__all__ = ["Connection", "SimulatedServer", "after_blocks", "conclude", "line"]

_BYTES_PER_MEGABIT = 125_000


def after_blocks(values: torch.Tensor, span: Span) -> torch.Tensor:
    """Return what these blocks make of the values (rows,), whole numbers below `MODULUS`.

    >>> after_blocks(torch.tensor([5]), Span(0, 2))
    tensor([56])
    """
    for block in range(span.start, span.stop):
        values = (3 * values + 7 * block + 1) % MODULUS
    return values


def line(mbps: float | None) -> Link:
    """Return one direction of a link of this rate, in megabits per second."""
    return Link(None if mbps is None else mbps * _BYTES_PER_MEGABIT)


class SimulatedServer:
    """One server. Used from one event loop, on its clock.

    blocks: that it holds now. pushes: what other servers send it, on its own link alone.
    is_gone: whether it is not there. computing: seconds that it has computed so far.
    lives: times it has come. broken_off: calls that were under way when it left, or when a connection to it broke.
    """

    def __init__(self, described: Server, scenario: Scenario):
        self.described = described
        self.blocks = described.blocks
        self.dtype = getattr(torch, scenario.dtype)
        self.free_cache = described.cache_tokens
        self.computing = 0.0
        self.is_gone = described.joins > 0
        self.lives = self.broken_off = 0
        self._loop = asyncio.get_running_loop()
        self._free_at = 0.0
        self._answered: dict[tuple[int, ...], torch.Tensor] = {}
        self.faults = FaultSwitch(self._loop.time)
        self.connections: dict[Connection, None] = {}  # in order: what breaks off is the same for a seed
        link = described.link
        self.up, self.down = line(link.up_mbps), line(link.down_mbps)
        self.pushes = Direction([self.up], link.delay, link.jitter)

    @property
    def computed(self) -> float:
        """Seconds that it has computed by now: `computing` has those of the calls in its queue, too."""
        return self.computing - max(0.0, self._free_at - self._loop.time())

    @property
    def version(self) -> str:
        """Its version of petals, as it says."""
        lie = self.faults.active_in_record(f.VersionLie)
        return self.described.version if lie is None else lie.version

    def come(self) -> None:
        """Begin, with nothing in its cache and nothing to do."""
        self.is_gone = False
        self.lives += 1
        self.free_cache = self.described.cache_tokens
        self._free_at = self._loop.time()

    def leave(self) -> None:
        """End: what is under way to it or from it breaks off."""
        self.is_gone = True
        for connection in list(self.connections):
            connection.break_off()

    def move(self, blocks: Span) -> None:
        """Hold other blocks, after a restart."""
        self.leave()
        self.blocks = blocks
        self.come()

    async def answer(
        self, activations: Activations, span: Span, connection: "Connection", code: LossyCode | None = None
    ) -> Message:
        """Return the answer to a call for these blocks, once those before it in the queue are done.

        Raises PeerUnreachableError when the connection breaks first, PeerRefusedError for what it does not take.
        """
        faults = self.faults
        with faults.call_in_flight():
            asked = _values(activations).numpy().tobytes() if faults.has_any else b""
            if faults.hits_call(f.Crash, asked):
                self.leave()
            if faults.hangs("before") or faults.hits_call(f.InfoOnly):
                await connection.silence()
            self._check(activations, span, code, asked)
            if slow := faults.hits_call(f.Slow, asked):
                await asyncio.sleep(slow[0].delay)
            hidden = await self._computed(activations, span, connection)
            if faults.has_any:
                hidden = corrupted(faults, hidden, asked, self._answered)
                if faults.hangs("middle"):
                    await connection.silence()
                if faults.hits_call(f.Reset):
                    connection.break_off()
            nbytes = hidden.numel() * (hidden.dtype.itemsize if code is None else code.bytes_per_value)
            message = Message(hidden, tuple(hidden.shape), hidden.dtype, nbytes, nbytes)
            return tampered(faults, message) if faults.has_any else message

    def _check(self, activations: Activations, span: Span, code: LossyCode | None, asked: bytes) -> None:
        """Raise PeerRefusedError, in the words of Petals' servers, for what it does not compute."""
        if refusal := self.faults.hits_call(f.Refuse, asked):
            raise PeerRefusedError(refusal[0].words)
        if self.faults.active_in_record(f.StaleRecord) or not span.within(self.blocks):
            raise PeerRefusedError("Remote peer does not serve these blocks")
        if code is not None and code.bytes_per_value == 1 and self.faults.hits_call(f.BrokenDecoder):
            raise PeerRefusedError("only 0-dimensional arrays can be converted to Python scalars")
        if activations.tokens > self.described.max_tokens:
            limit = f"max_batch_size ({self.described.max_tokens})"
            raise PeerRefusedError(f"Task size greater than {limit}, it can't be processed")

    async def _computed(self, activations: Activations, span: Span, connection: "Connection") -> torch.Tensor:
        described, now = self.described, self._loop.time()
        left = 1.0 - max((each.share for each in described.load if each.since <= now < each.until), default=0.0)
        share = len(span) / len(self.blocks)
        seconds = described.call_seconds + activations.tokens * share / (left * described.tokens_per_second)
        self._free_at = max(self._free_at, now) + seconds
        self.computing += seconds
        await connection.until(self._free_at)
        values = after_blocks(_values(activations), span).to(self.dtype)
        return values[:, None, None].expand(activations.hidden.shape)  # in the memory of one position


class Connection:
    """A client's connection to a server. Used from one event loop, on its clock.

    up, down: to the server and back from it. is_open: until it breaks.
    """

    def __init__(self, server: SimulatedServer, client_up: Link, client_down: Link):
        self.server = server
        link = server.described.link
        self.up = Direction([client_up, server.up], link.delay, link.jitter)
        self.down = Direction([server.down, client_down], link.delay, link.jitter)
        self.up.back, self.down.back = self.down, self.up
        self.is_open = not server.is_gone
        self._loop = asyncio.get_running_loop()
        self._outcomes: dict[asyncio.Future[None], None] = {}
        server.connections[self] = None

    def break_off(self) -> None:
        """End the connection, and with it whatever is under way on it."""
        self.is_open = False
        self.server.connections.pop(self, None)
        for outcome in list(self._outcomes):
            if not outcome.done():
                self.server.broken_off += 1
                outcome.set_exception(PeerUnreachableError("the connection broke"))

    async def carry(self, direction: Direction, nbytes: int) -> None:
        """Wait until a message has arrived. Raises PeerUnreachableError when the connection breaks first."""
        outcome = self.expect()
        direction.send(nbytes, partial(conclude, outcome))
        await outcome

    async def until(self, time: float) -> None:
        """Wait until a time on the loop's clock. Raises PeerUnreachableError when the connection breaks first."""
        outcome = self.expect()
        self._loop.call_at(time, conclude, outcome)
        await outcome

    async def silence(self) -> None:
        """Wait for what never comes. Raises PeerUnreachableError when the connection breaks."""
        await self.expect()

    def expect(self) -> "asyncio.Future[None]":
        """Return what is done when `conclude` is called, or fails when the connection breaks."""
        if not self.is_open:
            raise PeerUnreachableError("failed to dial: all dials failed")
        outcome: asyncio.Future[None] = self._loop.create_future()
        self._outcomes[outcome] = None
        outcome.add_done_callback(self._outcomes.pop)
        return outcome


def conclude(outcome: "asyncio.Future[None]") -> None:
    """Say that something has happened that `Connection.expect` was asked for."""
    if not outcome.done():  # nobody may wait for it any more
        outcome.set_result(None)


def _values(activations: Activations) -> torch.Tensor:
    return activations.hidden[:, 0, 0].to(torch.int64)
