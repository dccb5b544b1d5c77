"""Which faults of a server act on which of its calls, and how often they did."""

import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from petals_eval.local_swarm.faults.catalog import Fault, FaultCount, Hang

__all__ = ["FaultSwitch"]

F = TypeVar("F", bound=Fault)


class _ActiveFault(Generic[F]):
    """A fault that is switched on, with what it has seen since."""

    def __init__(self, fault: F, clock: Callable[[], float]):
        self.fault = fault
        self.draws = random.Random(f"{fault.seed} {type(fault).__name__}")
        self._clock = clock
        self.since = clock()
        self.calls = 0
        self.hits = 0

    def is_on(self) -> bool:
        seconds, at_most = self.fault.seconds, self.fault.at_most
        lasts = seconds is None or self._clock() - self.since < seconds
        return lasts and (at_most is None or self.hits < at_most)

    def draws_for(self, asked: bytes | None) -> random.Random:
        """Return the source of this call's draws, which goes by what is asked if the fault repeats."""
        if not self.fault.repeats or asked is None:
            return self.draws
        return random.Random(f"{self.fault.seed} {zlib.crc32(asked)}")


class FaultSwitch:
    """The faults of one server. Used from one event loop only.

    clock: seconds, by which faults last. counts: by the names of the faults, since the server started.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._active: list[_ActiveFault] = []
        self._calls_in_flight = 0
        self.counts: dict[str, FaultCount] = {}

    def switch(self, faults: Sequence[Fault]) -> None:
        """Have these faults and no others from now on."""
        self._active = [_ActiveFault(fault, self._clock) for fault in faults]

    @property
    def has_any(self) -> bool:
        """Whether there is any to look for."""
        return bool(self._active)

    def active(self, kind: type[F]) -> F | None:
        """Return the fault of this kind that is on now, or None; it is not counted."""
        found = self._find(kind)
        return None if found is None or not found.is_on() else found.fault

    def active_in_record(self, kind: type[F]) -> F | None:
        """Return the fault of this kind that is on now, or None, and count it: it goes into an announcement."""
        fault = self.active(kind)
        if fault is not None:
            self._count(fault)
        return fault

    def hits_call(self, kind: type[F], asked: bytes | None = None) -> tuple[F, random.Random] | None:
        """Return the fault of this kind with a source for its draws if it hits this call, and count it; else None.

        asked: the bytes of what the call asks, for faults that repeat.
        """
        found = self._find(kind)
        if found is None:
            return None
        found.calls += 1
        if not found.is_on() or found.calls <= found.fault.after:
            return None
        draws = found.draws_for(asked)
        if draws.random() >= found.fault.share:
            return None
        found.hits += 1
        self._count(found.fault)
        return found.fault, draws

    def hangs(self, where: str) -> bool:
        """Whether a `Hang` at this place hits the call, whose answer must then be waited for for ever."""
        found = self._find(Hang)
        return found is not None and found.fault.where == where and self.hits_call(Hang) is not None

    def _count(self, fault: Fault) -> None:
        count = self.counts.setdefault(fault.name, FaultCount())
        count.times += 1
        count.in_flight += self._calls_in_flight > 0

    def _find(self, kind: type[F]) -> _ActiveFault[F] | None:
        return next((active for active in self._active if isinstance(active.fault, kind)), None)

    @contextmanager
    def call_in_flight(self) -> Iterator[None]:
        """Count faults that act in the block as ones that met a client's call."""
        self._calls_in_flight += 1
        try:
            yield
        finally:
            self._calls_in_flight -= 1
