"""The micro-batches of one stream: handed over by the thread that makes them, sent by the event loop, and back again.

The two threads meet in queues and wait for each other only where there is nothing to do: every micro-batch costs a
wake-up of the loop and at most one of the caller's thread.
"""

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from petals_eval.swarm.connection import SwarmConnection
from petals_eval.swarm.pipeline import Pipeline, ServedHop

__all__ = ["Computed", "Failed", "Flight", "Work"]

T = TypeVar("T")

AHEAD = 4
"""Micro-batches that wait for the first server, so that it need not wait for the next one to be made."""
MOST_WAITING = 32
"""Micro-batches that wait for any server: where one falls behind for a moment, those before it go on, and it has what
to catch up with. With four, on a route of four busy servers, each pause of one went round to all of them: a tenth more
time."""
MOST_BYTES = 64 << 20
"""Hidden states in flight at most: they, and what serialisation makes of them, are the client's memory."""
MOST_MICRO_BATCHES = 256
"""In flight at most."""


@dataclass(frozen=True, eq=False)
class Work(Generic[T]):
    """A micro-batch on its way out.

    hidden: (batch, seq, hidden); prompts: (blocks, batch or 1, prefix, hidden) or None.
    made_for: the micro-batch size in force when it was made (`swarm.scheduling.tuning`); None: of another size.
    """

    tag: T
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    made_for: int | None = None


@dataclass(frozen=True, eq=False)
class Computed(Generic[T]):
    """A micro-batch on its way back.

    hidden: (batch, seq, hidden) in the last server's dtype; hops: who computed it, in order.
    """

    tag: T
    hidden: torch.Tensor
    hops: tuple[ServedHop, ...]


@dataclass(frozen=True, eq=False)
class Failed(Generic[T]):
    """A micro-batch that does not come back, and why."""

    tag: T
    error: Exception


@dataclass(frozen=True, eq=False)
class _Out(Generic[T]):
    """A micro-batch on its way to the event loop. cargo: its hidden states, to be taken out."""

    tag: T
    cargo: list[torch.Tensor]
    prompts: torch.Tensor | None
    bytes: int
    positions: int
    made_for: int | None


@dataclass(frozen=True, eq=False)
class _Back(Generic[T]):
    """What came of a micro-batch, on its way to the caller's thread."""

    bytes: int
    what: Computed[T] | Failed[T]


class Flight(Generic[T]):
    """What is in flight through blocks first:last for one stream. What is public belongs to the caller's thread.

    window: micro-batches in flight at most; None: as many as the servers' own windows take, and those that wait for one
        (`AHEAD`, `MOST_WAITING`).
    """

    def __init__(self, connection: SwarmConnection, pipeline: Pipeline, first: int, last: int, window: int | None):
        self._pipeline = pipeline
        self._first, self._last = first, last
        self._window = window
        self._outbox: queue.SimpleQueue[_Out[T]] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Back[T] | None] = queue.SimpleQueue()
        self._bytes = 0
        self._sent = 0
        self._started = 0  # written by the loop alone
        self._held_up = False
        self.in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._ended: Future[None] = connection.start(self._run)
        self._ended.add_done_callback(lambda _: self._inbox.put(None))

    def has_room(self) -> bool:
        """Whether to make and send another micro-batch now."""
        if self._window is not None:
            return self.in_flight < self._window
        if self.in_flight >= MOST_MICRO_BATCHES or (self._bytes >= MOST_BYTES and self.in_flight):
            return False  # until one is back
        self._held_up = True  # before looking: whoever leaves a line after the look tells of it
        self._held_up = self._enough_wait()
        return not self._held_up

    def _enough_wait(self) -> bool:
        """Whether so many micro-batches wait that another would only fill the memory."""
        lines, for_the_loop = self._pipeline.lines, self._sent - self._started
        return lines.length(self._first) + for_the_loop >= AHEAD or lines.waiting + for_the_loop >= MOST_WAITING

    def send(self, work: Work[T]) -> None:
        """Start a micro-batch on its way. Its hidden states are handed over: whoever waits for the answer would
        otherwise keep them until it is there."""
        hidden = work.hidden.detach()
        size = hidden.numel() * hidden.element_size()
        prompts = None if work.prompts is None else work.prompts.detach()
        self._outbox.put(_Out(work.tag, [hidden], prompts, size, hidden.shape[0] * hidden.shape[1], work.made_for))
        self.in_flight += 1
        self._sent += 1
        self._bytes += size
        if self._loop is not None and self._wake is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def next(self, timeout: float, on_failed: Callable[[Failed[T]], object]) -> list[Computed[T]]:
        """The next micro-batch that is back; nothing when none is within `timeout` seconds, or there is room for more.

        Raises SwarmError when the connection has ended.
        """
        try:
            back = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return []
        if back is None:
            if self._ended.done():
                self._ended.result()  # raises what ended it
            return []
        self.in_flight -= 1
        self._bytes -= back.bytes
        if isinstance(back.what, Failed):
            on_failed(back.what)
            return []
        return [back.what]

    def close(self) -> None:
        """Cancel what is in flight."""
        self._ended.cancel()

    async def _run(self) -> None:
        """Send what is handed over, until cancelled."""
        self._loop = asyncio.get_running_loop()
        wake = self._wake = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()
        self._pipeline.lines.listeners.add(self._tell_of_room)
        try:
            while True:
                wake.clear()
                while not self._outbox.empty():
                    task = asyncio.create_task(self._carry(self._outbox.get_nowait()))
                    self._started += 1
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await wake.wait()
        finally:
            for task in tasks:
                task.cancel()
            self._pipeline.lines.listeners.discard(self._tell_of_room)
            self._pipeline.pause()

    async def _carry(self, out: "_Out[T]") -> None:
        try:
            hidden, hops = await self._pipeline.forward(out.cargo.pop(), out.prompts, self._first, self._last)
            if out.made_for is not None:
                self._pipeline.size_came_back(out.made_for, out.positions)
            back: _Back[T] = _Back(out.bytes, Computed(out.tag, hidden, hops))
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that waits for the answer
            back = _Back(out.bytes, Failed(out.tag, error))
        self._inbox.put(back)

    def _tell_of_room(self) -> None:
        """The caller's thread stopped making micro-batches when enough were waiting, and may sleep."""
        if self._held_up and not self._enough_wait():
            self._held_up = False
            self._inbox.put(None)
