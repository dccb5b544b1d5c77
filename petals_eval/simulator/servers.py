"""Simulated servers: they compute one call after the other at their pace, in virtual time, what can be reckoned here.

Block b of a simulated model takes the value v of a row to 3v + 7b + 1 modulo 251, at every position alike. So an answer
shows which blocks ran, how often and in which order, and each value is exact in every dtype that servers compute in.
"""

import asyncio
from functools import partial

import torch

from petals_eval.errors import PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm.relays import Link
from petals_eval.simulator.network import Direction
from petals_eval.simulator.scenario import Scenario, Server
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.wire.span import Span

__all__ = ["MODULUS", "SimulatedServer", "after_blocks"]

MODULUS = 251
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
    """One server, and the connection to it. Used from one event loop, on its clock.

    up, down: to the server and back from it. pushes: what other servers send it, on its own link alone.
    is_gone: whether it has left. computing: seconds that it has computed so far.
    """

    def __init__(self, described: Server, scenario: Scenario, client_up: Link, client_down: Link):
        self.described = described
        self.dtype = getattr(torch, scenario.dtype)
        self.free_cache = described.cache_tokens
        self.computing = 0.0
        self.is_gone = False
        self._loop = asyncio.get_running_loop()
        self._free_at = 0.0
        self._outcomes: set[asyncio.Future[None]] = set()
        link = described.link
        up, down = line(link.up_mbps), line(link.down_mbps)
        self.up = Direction([client_up, up], link.delay, link.jitter)
        self.down = Direction([down, client_down], link.delay, link.jitter)
        self.pushes = Direction([up], link.delay, link.jitter)
        self.up.back, self.down.back = self.down, self.up

    def leave(self) -> None:
        """End: what is under way to it or from it breaks off."""
        self.is_gone = True
        for outcome in self._outcomes:
            if not outcome.done():
                outcome.set_exception(PeerUnreachableError("the connection broke"))

    async def carry(self, direction: Direction, nbytes: int) -> None:
        """Wait until a message has arrived. Raises PeerUnreachableError when the server leaves first."""
        outcome = self._expect()
        direction.send(nbytes, partial(_conclude, outcome))
        await outcome

    async def compute(self, activations: Activations, span: Span) -> torch.Tensor:
        """Return the hidden states after these blocks, once those before them in the queue are done.

        Raises PeerUnreachableError when the server leaves first, PeerRefusedError for more tokens than it takes.
        """
        described = self.described
        if activations.tokens > described.max_tokens:  # in the words of Petals' servers
            limit = f"max_batch_size ({described.max_tokens})"
            raise PeerRefusedError(f"Task size greater than {limit}, it can't be processed")
        share = len(span) / len(described.blocks)
        seconds = described.call_seconds + activations.tokens * share / described.tokens_per_second
        self._free_at = max(self._free_at, self._loop.time()) + seconds
        self.computing += seconds
        outcome = self._expect()
        self._loop.call_at(self._free_at, _conclude, outcome)
        await outcome
        hidden = activations.hidden
        values = after_blocks(hidden[:, 0, 0].to(torch.int64), span).to(self.dtype)
        return values[:, None, None].expand(hidden.shape)  # at every position alike, in the memory of one

    def _expect(self) -> "asyncio.Future[None]":
        if self.is_gone:
            raise PeerUnreachableError("failed to dial: all dials failed")
        outcome: asyncio.Future[None] = self._loop.create_future()
        self._outcomes.add(outcome)
        outcome.add_done_callback(self._outcomes.discard)
        return outcome


def _conclude(outcome: "asyncio.Future[None]") -> None:
    if not outcome.done():  # nobody may wait for it any more
        outcome.set_result(None)
