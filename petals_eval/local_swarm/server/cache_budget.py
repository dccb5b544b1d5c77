"""The budget that inference sessions share for their keys and values, with the lock that real servers lose.

Source: Petals 2.2.0 and 2.3.0.dev2 (`petals.server.memory_cache`), which agree, and what 2.2.0 was seen to do. One
session at a time is given room, under a lock; a session that may wait for room keeps the lock meanwhile. Whoever waits
for the lock does so in a thread. When its time is up the session gives up, and the thread does not: some day it gets
the lock, for nobody, and no session opens any more. Nothing else shows it: `rpc_info` tells of room, and the blocks
compute. A session that may not wait is refused as long as more is asked for than there is room, what others wait for
counted; otherwise it waits for the lock as well, and goes on waiting when its client has left.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["AllocationFailed", "CacheBudget"]


class AllocationFailed(Exception):
    """The cache has no room for the session. Clients see this name, which is that of Petals' servers."""


class CacheBudget:
    """Bytes that sessions reserve, one session after the other. Used from the server's event loop only."""

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._asked_bytes = 0  # by sessions that wait, for the lock or for room
        self._freed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._lost: set[asyncio.Task[bool]] = set()  # stand for the threads that get the lock for nobody

    @property
    def bytes_left(self) -> int:
        """The bytes that nobody has reserved."""
        return self.total_bytes - self.used_bytes

    @asynccontextmanager
    async def reserve(self, size: int, timeout: float) -> AsyncIterator[None]:
        """Hold `size` bytes in the block. Waits up to `timeout` seconds for room; raises AllocationFailed without."""
        allocating = asyncio.create_task(self._allocate(size, timeout))
        try:
            await asyncio.shield(allocating)
            yield
        finally:
            if allocating.done():
                self._free(allocating, size)
            else:
                allocating.add_done_callback(lambda task: self._free(task, size))

    async def _allocate(self, size: int, timeout: float) -> None:
        self._asked_bytes += size
        try:
            if timeout == 0 and self.used_bytes + self._asked_bytes > self.total_bytes:
                raise AllocationFailed(f"Could not allocate {size} bytes immediately: out of memory")
            async with asyncio.timeout(timeout or None) as limit:
                await self._acquire(limit)
                try:
                    await self._wait_for_room(size, timeout)
                finally:
                    self._lock.release()
            self.used_bytes += size
        except TimeoutError:
            raise AllocationFailed(f"Could not allocate {size} within {timeout} seconds") from None
        finally:
            self._asked_bytes -= size

    async def _acquire(self, limit: asyncio.Timeout) -> None:
        """Take the lock; a wait that the limit ends is lost, as the thread is on a real server."""
        thread = asyncio.create_task(self._lock.acquire())
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            if limit.expired():
                self._lost.add(thread)
            raise

    async def _wait_for_room(self, size: int, timeout: float) -> None:
        if size > self.bytes_left and timeout == 0:
            raise AllocationFailed(f"Could not allocate {size} bytes immediately: out of memory")
        if size > self.total_bytes:
            raise AllocationFailed(f"Could not allocate {size} bytes, max cache size = {self.total_bytes} bytes")
        while size > self.bytes_left:
            self._freed.clear()
            await self._freed.wait()

    def _free(self, allocating: "asyncio.Task[None]", size: int) -> None:
        """Give back what a session was given, which may be after its end."""
        if not allocating.cancelled() and allocating.exception() is None:
            self.used_bytes -= size
            self._freed.set()
