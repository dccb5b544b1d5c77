"""The micro-batches of one stream: made by one side, sent by the event loop, and back again.

`MicroBatchStream` is the core: whoever makes the micro-batches may be a coroutine of the same loop, as in a simulator,
or another thread. `BlockingStream` is the bridge for a thread. The two threads meet in queues and wait for each other
only where there is nothing to do: every micro-batch costs a wake-up of the loop and at most one of the caller's thread.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.lanes.prefix import Entering, PrefixedRows
from petals_eval.swarm.micro_batch import Computed, Failed, Work
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.wire.span import Span

__all__ = ["BlockingStream", "MicroBatchStream", "Returned", "StreamPolicy"]

T = TypeVar("T")


@dataclass(frozen=True)
class StreamPolicy:
    """How much of a stream may be on its way.

    max_queued_first: micro-batches that wait for the first server, so that it need not wait for the next one to be
        made.
    max_queued_total: micro-batches that wait for any server: where one falls behind for a moment, those before it go
        on, and it has what to catch up with. With four, on a route of four busy servers, each pause of one went round
        to all of them: a tenth more time.
    max_bytes: hidden states in flight: they, and what serialisation makes of them, are the client's memory.
    max_micro_batches: in flight.
    """

    max_queued_first: int = 4
    max_queued_total: int = 32
    max_bytes: int = 64 << 20
    max_micro_batches: int = 256


@dataclass(frozen=True, eq=False)
class Returned(Generic[T]):
    """What came of a micro-batch. nbytes: of the hidden states that it was sent with."""

    result: Computed[T] | Failed[T]
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Queued(Generic[T]):
    """A micro-batch for the event loop. hidden_box: holds its activations, to be taken out."""

    tag: T
    hidden_box: list[Entering]
    nbytes: int


class MicroBatchStream(Generic[T]):
    """What is in flight through these blocks for one stream.

    `has_room`, `send`, `end` and `take` belong to the producer; `run` to the event loop.
    in_flight: sent and not taken yet.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        span: Span,
        window: int | None,
        deliver: Callable[[Returned[T] | None], object],
        policy: StreamPolicy = StreamPolicy(),
    ):
        """
        window: micro-batches in flight at most; None: as many as the servers' own windows take, and those that wait for
            one.
        deliver: called in the event loop with what came of a micro-batch, and with None when a producer that paused may
            go on.
        """
        self._pipeline = pipeline
        self._span = span
        self._window = window
        self._deliver = deliver
        self._policy = policy
        self._outbox: deque[_Queued[T]] = deque()
        self._nbytes = 0
        self._sent = 0
        self._started = 0  # written by the event loop alone
        self._producer_paused = False
        self.in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # while `run` does
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order: what is cancelled is so in the order sent
        pipeline.queues.producing.add(self)

    def has_room(self) -> bool:
        """Return whether to make and send another micro-batch now."""
        if self._window is not None:
            return self.in_flight < self._window
        if self.in_flight >= self._policy.max_micro_batches or (
            self._nbytes >= self._policy.max_bytes and self.in_flight
        ):
            return False  # until one is back
        self._producer_paused = True  # before looking: whoever leaves a queue after the look resumes the producer
        self._producer_paused = self._has_queued_enough()
        return not self._producer_paused

    def _has_queued_enough(self) -> bool:
        """Return whether so many micro-batches wait that another would only fill the memory."""
        queues, for_the_loop = self._pipeline.queues, self._sent - self._started
        return (
            queues.length(self._span.start) + for_the_loop >= self._policy.max_queued_first
            or queues.waiting + for_the_loop >= self._policy.max_queued_total
        )

    def send(self, work: Work[T]) -> None:
        """Start a micro-batch on its way. Its hidden states are handed over: whoever waits for the answer would
        otherwise keep them until it is there."""
        prompts = None if work.prompts is None else work.prompts.detach()
        activations: Entering = Activations(work.hidden.detach(), prompts, self._span.start)
        if work.prefix is not None:
            activations = PrefixedRows(work.hidden.detach(), work.prefix, work.lane)
        nbytes = activations.nbytes
        self._outbox.append(_Queued(work.tag, [activations], nbytes))
        self.in_flight += 1
        self._sent += 1
        self._nbytes += nbytes
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._start_sent)

    def end(self) -> None:
        """Say that nothing more will be sent, unless an answer asks for it."""
        self._pipeline.queues.producing.discard(self)

    def take(self, returned: Returned[T]) -> Computed[T] | Failed[T]:
        """Count a micro-batch as no longer in flight, and return what came of it."""
        self.in_flight -= 1
        self._nbytes -= returned.nbytes
        return returned.result

    async def run(self) -> None:
        """Send what is handed over, until cancelled."""
        listeners = self._pipeline.queues.listeners
        async with self._pipeline.streaming():
            listeners.add(self._resume_producer)
            self._loop = asyncio.get_running_loop()
            try:
                self._start_sent()
                await self._loop.create_future()
            finally:
                self._loop = None
                self.end()
                listeners.discard(self._resume_producer)
                for task in self._tasks:
                    task.cancel()

    def _start_sent(self) -> None:
        """Start whatever was sent: in a task each, from the event loop itself, so that `run` need not be woken."""
        while self._outbox and self._loop is not None:
            task = self._loop.create_task(self._run_one(self._outbox.popleft()))
            self._started += 1
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)

    async def _run_one(self, queued: _Queued[T]) -> None:
        result: Computed[T] | Failed[T]
        try:
            answer, hops = await self._pipeline.forward(queued.hidden_box.pop(), self._span)
            result = Computed(queued.tag, answer.hidden, hops)
        except Exception as error:  # noqa: BLE001 - it is raised again where the answer is waited for
            result = Failed(queued.tag, error)
        self._deliver(Returned(result, queued.nbytes))

    def _resume_producer(self) -> None:
        """Wake the producer, which stopped making micro-batches when enough were waiting, and may sleep."""
        if self._producer_paused and not self._has_queued_enough():
            self._producer_paused = False
            self._deliver(None)


class BlockingStream(MicroBatchStream[T]):
    """The bridge to a thread that makes micro-batches and waits for them. Everything public belongs to that thread."""

    def __init__(self, loop: EventLoop, pipeline: Pipeline, span: Span, window: int | None):
        self._inbox: queue.SimpleQueue[Returned[T] | None] = queue.SimpleQueue()
        super().__init__(pipeline, span, window, self._inbox.put)
        self._ended = loop.start(self.run)
        self._ended.add_done_callback(lambda _: self._inbox.put(None))

    def next(self, timeout: float, on_failed: Callable[[Failed[T]], object]) -> list[Computed[T]]:
        """Return the next micro-batch that is back; nothing when none is within `timeout` seconds, or there is room.

        Raises SwarmError when the connection has ended.
        """
        try:
            returned = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return []
        if returned is None:
            if self._ended.done():
                self._ended.result()  # raises what ended it
            return []
        result = self.take(returned)
        if isinstance(result, Failed):
            on_failed(result)
            return []
        return [result]

    def close(self) -> None:
        """Cancel what is in flight."""
        self.end()
        self._ended.cancel()
