"""Where micro-batches wait for a server: one line before each block, first come first served.

Only the first in a line looks for a server. Whoever is behind it would find the same one, and with hundreds of
micro-batches waiting the looking would cost more than the sending. How many wait says whether to make more of them
(`petals_eval.swarm.stream`): what runs far ahead of the slowest server only fills the memory.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

__all__ = ["Line", "Lines"]


class Line:
    """Those who wait to enter one block."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.length = 0
        self._news = asyncio.Event()

    async def news(self, timeout: float) -> None:
        """Wait until a call has ended somewhere, `timeout` seconds at most."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()

    def tell(self) -> None:
        self._news.set()


class Lines:
    """The lines of one pipeline, by the block that is entered.

    waiting: micro-batches in all of them. May be read from any thread.
    listeners: called whenever one has left a line.
    """

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self.waiting = 0
        self.listeners: set[Callable[[], None]] = set()

    def length(self, block: int) -> int:
        """Micro-batches in the line before a block. May be read from any thread."""
        line = self._lines.get(block)
        return 0 if line is None else line.length

    @asynccontextmanager
    async def first(self, block: int) -> AsyncIterator[Line]:
        """Wait in the line before a block, and be the first in it while the body runs."""
        line = self._lines.setdefault(block, Line())
        line.length += 1
        self.waiting += 1
        try:
            async with line.turn:
                yield line
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[block]
            self.waiting -= 1
            for listener in self.listeners:
                listener()

    def tell_news(self) -> None:
        """A call has ended: there may be room now."""
        for line in self._lines.values():
            line.tell()
