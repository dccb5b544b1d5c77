"""The budget that inference sessions share for their keys and values."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["AllocationFailed", "CacheBudget"]


class AllocationFailed(Exception):
    """The cache has no room for the session. Clients see this name, which is that of Petals' servers."""


class CacheBudget:
    """Bytes handed out to sessions, first come, first served. Used from the server's event loop only."""

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._freed = asyncio.Condition()
        self._turn = asyncio.Lock()

    @property
    def bytes_left(self) -> int:
        return self.total_bytes - self.used_bytes

    @asynccontextmanager
    async def reserve(self, size: int, timeout: float) -> AsyncIterator[None]:
        """Hold `size` bytes. Waits up to `timeout` seconds for room; raises AllocationFailed where there is none."""
        if timeout == 0 and (size > self.bytes_left or self._turn.locked()):
            raise AllocationFailed(f"Could not allocate {size} bytes immediately: out of memory")
        if size > self.total_bytes:
            raise AllocationFailed(f"Could not allocate {size} bytes, max cache size = {self.total_bytes} bytes")
        try:
            async with asyncio.timeout(timeout or None), self._turn, self._freed:
                await self._freed.wait_for(lambda: size <= self.bytes_left)
                self.used_bytes += size
        except TimeoutError:
            raise AllocationFailed(f"Could not allocate {size} bytes within {timeout} seconds") from None
        try:
            yield
        finally:
            self.used_bytes -= size
            async with self._freed:
                self._freed.notify_all()
