"""Event loops whose clock stands still while anything runs, and jumps to the next timer when nothing does."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, TypeVar

from petals_eval.swarm.runtime import Runtime

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that never waits: the time it was given to wait passes on the loop's clock instead."""

    def __init__(self, pass_time: Callable[[float], None]):
        super().__init__()
        self._pass_time = pass_time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and no timer is set: nothing would ever happen again")
        if not ready and timeout:
            self._pass_time(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self._pass))

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> float:
        return self.now

    def runtime(self, seed: int = 0) -> Runtime:
        """Return a runtime on this loop's clock, with chance of its own."""

        async def at_once(function: Callable[..., T], /, *args: Any) -> T:
            return function(*args)

        return Runtime(lambda: self.now, lambda: self.now, Random(seed), at_once)


def run_in_virtual_time(make: Callable[[Runtime], Coroutine[Any, Any, T]], *, seed: int = 0) -> tuple[T, float]:
    """Run what `make` makes, given a runtime; return its result, and the virtual seconds it took."""
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(make(loop.runtime(seed)))
        return result, loop.now
