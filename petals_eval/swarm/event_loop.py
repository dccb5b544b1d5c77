"""The event loop of a connection: one thread in which everything that waits for the network runs."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from petals_eval.errors import ConfigError, SwarmError

__all__ = ["EventLoop"]

T = TypeVar("T")


class EventLoop:
    """An asyncio event loop in a thread of its own, with synchronous methods to run coroutine functions in it.

    What runs is cancelled, and fails with SwarmError, when the loop is told that it cannot go on.
    """

    def __init__(self, name: str):
        """name: of the thread."""
        self._context = start_blocking_portal("asyncio", {"use_uvloop": True}, name=name)
        self._portal: BlockingPortal | None = self._context.__enter__()
        self._thread = self._portal.call(threading.current_thread)
        self._background: list[Future[Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lost_because: str | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether this is the process whose loop it is: a forked one has no thread that runs it."""
        return os.getpid() == self._process

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function in the loop and wait for it; an interrupt here cancels it there."""
        future = self.start(function, *args)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, function: Callable[..., Awaitable[T]], *args: Any) -> "Future[T]":
        """Start a coroutine function in the loop. Cancelling the future cancels it.

        Raises SwarmError after close(), and in the future when the loop was given up; RuntimeError from within the
        loop itself: waiting there would never end; ConfigError in a process that was forked from the loop's.
        """
        if not self.is_ours:
            raise ConfigError(
                f"the connection to the swarm belongs to process {self._process}, and a process forked from it "
                f"({os.getpid()}) has no part in it: open a RemoteModel of its own there, or start it by spawn."
            )
        if self._portal is None:
            raise SwarmError("the connection to the swarm is closed: connect again")
        return self._portal.start_task_soon(self._while_not_lost, function, *args)

    def start_background(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a coroutine function that runs until the loop is closed."""
        self._background.append(self.start(function, *args))

    async def _while_not_lost(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        task = asyncio.current_task()
        if task is None or self._lost_because is not None:
            raise SwarmError(str(self._lost_because))
        self._tasks.add(task)
        try:
            return await function(*args)
        except asyncio.CancelledError:
            if self._lost_because is None:
                raise
            task.uncancel()
            raise SwarmError(self._lost_because) from None
        finally:
            self._tasks.discard(task)

    def give_up(self, why: str) -> None:
        """End with SwarmError whatever runs, and whatever is started from now on. To be called in the loop."""
        self._lost_because = why
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def close(self, last: Callable[[], Awaitable[object]]) -> None:
        """Cancel everything, run `last`, and end the thread. Safe to call twice: the second call does nothing.

        In a forked process it does nothing at all: the connection is its parent's. Called from within the loop, as the
        garbage collector may, it goes on in a thread of its own.
        """
        if not self.is_ours:
            return
        if threading.current_thread() is self._thread:
            threading.Thread(target=self.close, args=(last,), name="closing").start()
            return
        with self._lock:
            portal, self._portal = self._portal, None
        if portal is None:
            return
        for task in self._background:
            task.cancel()
        try:
            portal.call(last)
        finally:
            portal.call(portal.stop, True)
            self._context.__exit__(None, None, None)
