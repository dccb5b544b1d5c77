"""Servers that opened no session: remembered from one look to the next, so that they are not asked again each time."""

import time
from collections.abc import Callable

from petals_eval.health.results import Finding
from petals_eval.swarm.peers.caches import LOCKED_REST

__all__ = ["LockedServers"]


class LockedServers:
    """What was found of them, for LOCKED_REST seconds each: every try leaves a thread there that waits for ever."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._found: dict[str, tuple[float, Finding]] = {}

    def add(self, peer_id: str, found: Finding) -> None:
        self._found[peer_id] = self._clock(), found

    def known(self, peer_id: str) -> Finding | None:
        """What was found, while the server is not to be asked again."""
        at, found = self._found.get(peer_id, (0.0, None))
        return found if found is not None and self._clock() - at < LOCKED_REST else None
