"""Servers that opened no session: remembered from one look to the next, so that they are not asked again each time."""

import time
from collections.abc import Callable

from petals_eval.health.results import Finding
from petals_eval.swarm.peers.session_cache import CachePolicy

__all__ = ["LockedServers"]


class LockedServers:
    """Keeps what was found of them for `CachePolicy.locked_rest` seconds.

    Every try leaves a thread on such a server that waits for ever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._found: dict[str, tuple[float, Finding]] = {}

    def add(self, peer_id: str, found: Finding) -> None:
        """Remember what was found of a server just now."""
        self._found[peer_id] = self._clock(), found

    def known(self, peer_id: str) -> Finding | None:
        """Return what was found, while the server is not to be asked again."""
        at, found = self._found.get(peer_id, (0.0, None))
        return found if found is not None and self._clock() - at < CachePolicy.locked_rest else None
