"""The runtime: clock, chance and threads, handed to everything that decides: a simulator hands in its own."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

__all__ = ["InThread", "Runtime"]

InThread = Callable[..., Awaitable[Any]]
"""Runs a function, given with its arguments, that takes long, where the event loop must go on."""


@dataclass(frozen=True, eq=False)
class Runtime:
    """What the layers above the transport take from the world beside answers.

    monotonic: seconds on a clock that only goes forward. epoch: seconds since 1970.
    random: seeded from the operating system, for a server must not be able to guess what is checked.

    Waiting (`asyncio.sleep`, `asyncio.timeout`) goes by the event loop's own clock: a simulator brings a loop whose
    clock is `monotonic`.
    """

    monotonic: Callable[[], float] = time.monotonic
    epoch: Callable[[], float] = time.time
    random: Random = field(default_factory=Random)
    in_thread: InThread = asyncio.to_thread
