"""The cache book: what is known of the servers' caches for sessions, and when one may be asked for room. No I/O.

A session reserves the keys and values of every position that it may come to, in every block: rows x positions x blocks.
That is what is counted here, in tokens of one block. `cache_tokens_available` in rpc_info counts the same, for all
sessions through all blocks of the server. `cache_tokens_left` in its record counts twice as many, for there keys and
values count apart. Read off Petals 2.2.0 and 2.3.0.dev2 (`MemoryCache.bytes_left` over `cache_bytes_per_token` of the
backend, and over `bytes_per_token` of the announcer), and measured on 2.2.0: a server of three blocks that was started
with 256 tokens of cache says 768 and 1,536.

A server must never be let wait for room: two sessions that do so at once leave it where no session opens any more. So a
full cache refuses at once, and whoever was refused waits here and asks again. Such a refusal says "out of memory" to a
session that fits when others end and to one that never will. They are told apart by the most that was ever seen free.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from petals_eval.swarm.peers.peer import short_peer
from petals_eval.swarm.wire.records import SpanServer

__all__ = ["CacheBook", "Wait"]

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds until a full cache is asked again; twice as long after each refusal, up to this."""
PATIENCE = 30.0
"""Seconds for which a session that needs more than was ever seen free is tried, and for which a server may refuse what
it says it has room for: others' sessions end meanwhile, if they do."""
LOCKED_REST = 600.0
"""Seconds without a session on a server that opens none: only a restart mends it, and each try leaves a thread there
that waits for ever."""
_CONTRADICTIONS = 3
"""Refusals of what a server says it has room for, at least, until it is believed to open no session."""
_JITTER = 0.2
"""Share of a wait by which it is longer or shorter: two that ask at the same moment are both refused, for each counts
what the other asks for."""


@dataclass(frozen=True, slots=True)
class Wait:
    """seconds: until a server that gave no session may be asked for one again. why: for a person to read."""

    seconds: float
    why: str

    @property
    def is_over(self) -> bool:
        return self.seconds <= 0


@dataclass(slots=True)
class _Cache:
    """What is known of one server's cache. Times are on the book's clock, room is in tokens.

    most_free: that was seen while no session of ours was open there. ours: sessions open there.
    """

    most_free: int | None = None
    ours: int = 0
    # after a refusal
    refused: int = 0  # the least that was refused of late; 0: nothing
    words: str = ""
    delay: float = 0.0
    due_at: float = 0.0
    # of sessions that need more than `most_free`
    beyond: int | None = None  # what `most_free` was when the first of them was refused
    beyond_since: float = 0.0
    beyond_asked_at: float = -math.inf
    is_told: bool = False
    # of refusals of what the server says it has room for
    contradictions: int = 0
    contradicted_since: float = 0.0
    # no sessions at all
    closed_until: float = -math.inf
    closed_for: str = ""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class CacheBook:
    """What one connection knows of its servers' caches. Used from its event loop only; `notices` from any thread.

    notices: sessions that need more than a server was ever seen to have, for a person to read; one a server.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, draws: random.Random | None = None):
        self._clock = clock
        self._draws = draws or random.Random()
        self._caches: dict[str, _Cache] = {}
        self.notices: list[str] = []

    def _of(self, peer_id: str) -> _Cache:
        return self._caches.setdefault(peer_id, _Cache())

    # -- what was seen

    def most_free(self, peer_id: str) -> int | None:
        """The most room that the server claimed or showed while no session of ours was open there; None: none."""
        return self._of(peer_id).most_free

    def shown(self, peer_id: str, free: int | None) -> None:
        """rpc_info just said so. While a session of ours is open it says nothing of what there is without us."""
        cache = self._of(peer_id)
        if free is not None and not cache.ours:
            cache.most_free = max(free, cache.most_free or 0)

    def claimed(self, server: SpanServer) -> None:
        """The server's record says so."""
        left = server.record.cache_tokens_left
        self.shown(server.peer_id, None if left is None else left // 2)

    def opened(self, peer_id: str, need: int) -> None:
        """A session of ours has been given so much room."""
        cache = self._of(peer_id)
        cache.ours += 1
        cache.contradictions = 0
        if need >= cache.refused:
            cache.refused, cache.delay = 0, 0.0

    def ended(self, peer_id: str) -> None:
        """That session is over."""
        self._of(peer_id).ours -= 1

    # -- what it said

    def refused(self, peer_id: str, need: int, words: str, *, shown_free: int | None = None) -> None:
        """The server has no room for so much now.

        words: of its refusal. shown_free: what it had said just before that is free, if it was asked.
        """
        cache, now = self._of(peer_id), self._clock()
        if cache.due_at <= now or not cache.refused:  # those that asked together are refused together
            cache.delay = min(LONGEST_WAIT, max(FIRST_WAIT, 2 * cache.delay))
            cache.due_at = now + cache.delay * self._draws.uniform(1 - _JITTER, 1 + _JITTER)
        cache.refused = min(need, cache.refused or need)
        cache.words = words
        if shown_free is None or shown_free < need:
            cache.contradictions = 0
        else:
            cache.contradicted_since = cache.contradicted_since if cache.contradictions else now
            cache.contradictions += 1
            if cache.contradictions >= _CONTRADICTIONS and now - cache.contradicted_since >= PATIENCE:
                self.locked(peer_id, f"it says that {shown_free:,} tokens of its cache are free, and refuses {need:,}")
        if cache.most_free is not None and need > cache.most_free:
            if cache.beyond != cache.most_free:
                cache.beyond, cache.beyond_since = cache.most_free, now
            cache.beyond_asked_at = now
            if not cache.is_told:
                cache.is_told = True
                self.notices.append(
                    f"warning: a session needs {_tokens(need)} of the cache of server {short_peer(peer_id)}, where "
                    f"{cache.most_free:,} are the most that were ever seen free. Such sessions fail on it unless that "
                    f"changes within {PATIENCE:g} s."
                )

    def locked(self, peer_id: str, words: str) -> str:
        """It opens no session, and goes on with all else. Returns why, for a person."""
        cache = self._of(peer_id)
        cache.closed_until = self._clock() + LOCKED_REST
        cache.closed_for = f"{words}: its cache may be locked, which a restart of the server mends"
        cache.contradictions = 0
        return cache.closed_for

    def incompatible(self, peer_id: str, words: str) -> None:
        """Its sessions are not for us."""
        cache = self._of(peer_id)
        cache.closed_until, cache.closed_for = math.inf, words

    def forget(self, peer_id: str) -> None:
        """It may have come back as another, with another cache."""
        cache = self._caches.get(peer_id)
        if cache is not None:
            self._caches[peer_id] = _Cache(ours=cache.ours, is_told=cache.is_told, turn=cache.turn)

    # -- whether to ask

    def wait(self, peer_id: str, need: int) -> Wait | None:
        """How long not to ask the server for a session that needs so much, and why; None: nothing speaks against it."""
        cache = self._caches.get(peer_id)
        if cache is None:
            return None
        now = self._clock()
        if cache.closed_until > now:
            return Wait(cache.closed_until - now, f"server {short_peer(peer_id)}: {cache.closed_for}")
        if self.is_full(peer_id, need):
            why = f"server {short_peer(peer_id)}: {self.why_full(peer_id, need)}"
            return Wait(max(0.0, cache.due_at - now), why)
        return None

    def may_be_asked(self, peer_id: str, need: int) -> bool:
        """Whether the server may be asked now for a session that needs so much."""
        wait = self.wait(peer_id, need)
        return wait is None or wait.is_over

    def is_full(self, peer_id: str, need: int) -> bool:
        """Whether so much, or less, was refused last time."""
        cache = self._caches.get(peer_id)
        return cache is not None and 0 < cache.refused <= need

    def why_full(self, peer_id: str, need: int) -> str:
        """What a person is told of a full cache: the server's words, and both numbers."""
        cache = self._of(peer_id)
        seen = "" if cache.most_free is None else f"; {cache.most_free:,} are the most that were seen free"
        return f"{cache.words}; the session needs {_tokens(need)} of its cache{seen}"

    def never_fits(self, peer_id: str, need: int) -> str | None:
        """Why a session that needs so much is not to be tried there any more; None: it is."""
        cache = self._caches.get(peer_id)
        if cache is None or cache.most_free is None or need <= cache.most_free or cache.beyond != cache.most_free:
            return None
        was_tried = cache.beyond_asked_at - cache.beyond_since >= PATIENCE
        if not was_tried or self._clock() - cache.beyond_asked_at >= PATIENCE:
            return None
        return (
            f"the session needs {_tokens(need)} of its cache, where {cache.most_free:,} are the most that were seen "
            f"free, for {PATIENCE:g} s"
        )

    def never_opens(self, peer_id: str) -> str | None:
        """Why no session is to be opened there, ever; None: one may be, perhaps later."""
        cache = self._caches.get(peer_id)
        return cache.closed_for if cache is not None and cache.closed_until == math.inf else None

    def turn(self, peer_id: str) -> asyncio.Lock:
        """Held while a server with a full cache is asked: two that ask at once are both refused."""
        return self._of(peer_id).turn


def _tokens(need: int) -> str:
    return f"{need:,} tokens (rows x positions x blocks)"
