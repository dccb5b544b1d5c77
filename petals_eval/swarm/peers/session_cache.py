"""A server's cache for sessions: what is known of it, and when it may be asked for room. No I/O.

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
import logging
import math
from dataclasses import dataclass

from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.records import ServerRecord

__all__ = ["CachePolicy", "SessionCache", "Wait"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePolicy:
    """How a full cache is asked again, and when it is given up. Times are seconds.

    first_wait, longest_wait: until a full cache is asked again; twice as long after each refusal.
    jitter: share of a wait by which it is longer or shorter: two that ask at the same moment are both refused, for each
        counts what the other asks for.
    patience: for which a session that needs more than was ever seen free is tried, and for which a server may refuse
        what it says it has room for: others' sessions end meanwhile, if they do.
    min_contradictions: refusals of what a server says it has room for until it is believed to open no session.
    locked_rest: without a session on a server that opens none: only a restart mends it, and each try leaves a thread
        there that waits for ever.
    """

    first_wait: float = 0.1
    longest_wait: float = 5.0
    jitter: float = 0.2
    patience: float = 30.0
    min_contradictions: int = 3
    locked_rest: float = 600.0


@dataclass(frozen=True, slots=True)
class Wait:
    """How many seconds not to ask a server for a session, and why, for a person to read."""

    seconds: float
    why: str

    @property
    def is_over(self) -> bool:
        """Whether it may be asked now."""
        return self.seconds <= 0


@dataclass(slots=True)
class _Refusals:
    """What a server refused of late.

    least: tokens of the smallest session among them; 0: none. delay, due_at: how long it is left alone, and until when.
    """

    least: int = 0
    words: str = ""
    delay: float = 0.0
    due_at: float = 0.0


@dataclass(slots=True)
class _Beyond:
    """Sessions that need more than was ever seen free, refused while that was `most_free`."""

    most_free: int | None = None
    since: float = 0.0
    asked_at: float = -math.inf


@dataclass(slots=True)
class _Contradictions:
    """Refusals of what the server says it has room for."""

    count: int = 0
    since: float = 0.0


class SessionCache:
    """What is known of one server's cache. Room is in tokens of one block.

    most_free: the most room that the server claimed or showed while no session of ours was open there; None: nothing.
    held: the room that sessions of ours have there now.
    notice: a warning for a person, once a session needed more than that; None: there is none.
    turn: held while a server with a full cache is asked: two that ask at once are both refused.
    """

    def __init__(self, server: str, runtime: Runtime):
        """server: its name for messages."""
        self.notice: str | None = None
        self.turn = asyncio.Lock()
        self._server = server
        self._runtime = runtime
        self._open_sessions = 0
        self.held = 0
        self.ask_anew()

    def ask_anew(self) -> None:
        """Forget what the server said: it may have come back as another, with another cache."""
        self.most_free: int | None = None
        self._refusals, self._beyond, self._contradictions = _Refusals(), _Beyond(), _Contradictions()
        self._closed_until, self._closed_for = -math.inf, ""

    # -- what was seen

    def observe_free(self, free: int | None) -> None:
        """Note what rpc_info just said is free. While a session of ours is open it says nothing of the whole cache."""
        if free is not None and not self._open_sessions:
            self.most_free = max(free, self.most_free or 0)

    def observe_record(self, record: ServerRecord) -> None:
        """Note what the server's record says is left."""
        left = record.cache_tokens_left
        self.observe_free(None if left is None else left // 2)

    def on_opened(self, need: int) -> None:
        """Count a session of ours that has been given so much room."""
        self._open_sessions += 1
        self.held += need
        self._contradictions.count = 0
        if need >= self._refusals.least:
            self._refusals.least, self._refusals.delay = 0, 0.0

    def on_ended(self, need: int) -> None:
        """Count a session of ours that is over, and that had so much room."""
        self._open_sessions -= 1
        self.held -= need

    def on_full(self, need: int, words: str, *, shown_free: int | None = None) -> None:
        """Note that the server has no room for so much now.

        words: of its refusal. shown_free: what it had said just before that is free, if it was asked.
        """
        self._back_off(need, words)
        self._count_contradiction(need, shown_free)
        if self.most_free is not None and need > self.most_free:
            self._note_beyond(need, self.most_free)

    def _back_off(self, need: int, words: str) -> None:
        refusals, policy, now = self._refusals, CachePolicy, self._runtime.monotonic()
        if refusals.due_at <= now or not refusals.least:  # those that asked together are refused together
            refusals.delay = min(policy.longest_wait, max(policy.first_wait, 2 * refusals.delay))
            share = self._runtime.random.uniform(1 - policy.jitter, 1 + policy.jitter)
            refusals.due_at = now + refusals.delay * share
        refusals.least = min(need, refusals.least or need)
        refusals.words = words
        until = refusals.due_at - now
        _log.debug("%s: no session of %d tokens now (%s); asked again in %.2f s", self._server, need, words, until)

    def _count_contradiction(self, need: int, shown_free: int | None) -> None:
        known, now = self._contradictions, self._runtime.monotonic()
        if shown_free is None or shown_free < need:
            known.count = 0
            return
        known.since = known.since if known.count else now
        known.count += 1
        if known.count >= CachePolicy.min_contradictions and now - known.since >= CachePolicy.patience:
            self.on_locked(f"it says that {shown_free:,} tokens of its cache are free, and refuses {need:,}")

    def _note_beyond(self, need: int, most_free: int) -> None:
        now = self._runtime.monotonic()
        if self._beyond.most_free != most_free:
            self._beyond = _Beyond(most_free, now)
        self._beyond.asked_at = now
        if self.notice is None:
            self.notice = (
                f"warning: a session needs {_tokens(need)} of the cache of server {self._server}, where {most_free:,} "
                "are the most that were ever seen free. Such sessions fail on it unless that changes within "
                f"{CachePolicy.patience:g} s."
            )

    def on_locked(self, words: str) -> str:
        """Note that the server opens no session, and goes on with all else. Returns why, for a person."""
        self._closed_until = self._runtime.monotonic() + CachePolicy.locked_rest
        self._closed_for = f"{words}: its cache may be locked, which a restart of the server mends"
        self._contradictions.count = 0
        _log.debug("%s: no session for %g s: %s", self._server, CachePolicy.locked_rest, words)
        return self._closed_for

    def on_incompatible(self, words: str) -> None:
        """Note that this client cannot use the server's sessions."""
        self._closed_until, self._closed_for = math.inf, words
        _log.debug("%s: no session, ever: %s", self._server, words)

    # -- whether to ask

    def wait(self, need: int) -> Wait | None:
        """Return how long not to ask for a session that needs so much, and why; None: nothing speaks against it."""
        now = self._runtime.monotonic()
        if self._closed_until > now:
            return Wait(self._closed_until - now, f"server {self._server}: {self._closed_for}")
        if self.is_full(need):
            return Wait(max(0.0, self._refusals.due_at - now), f"server {self._server}: {self.why_full(need)}")
        return None

    def may_be_asked(self, need: int) -> bool:
        """Return whether the server may be asked now for a session that needs so much."""
        wait = self.wait(need)
        return wait is None or wait.is_over

    def is_full(self, need: int) -> bool:
        """Return whether so much, or less, was refused last time."""
        return 0 < self._refusals.least <= need

    def why_full(self, need: int) -> str:
        """Return what a person is told of a full cache: the server's words, and both numbers."""
        seen = "" if self.most_free is None else f"; {self.most_free:,} are the most that were seen free"
        return f"{self._refusals.words}; the session needs {_tokens(need)} of its cache{seen}"

    def leaves_others(self, need: int, share: float) -> bool:
        """Return whether a session that needs so much leaves others this share of the room that there is, as far as
        that is known. The first of ours may take what it needs."""
        return self.most_free is None or not self.held or self.held + need <= (1 - share) * self.most_free

    def never_fits(self, need: int) -> str | None:
        """Return why a session that needs so much is not to be tried there any more; None: it is."""
        beyond, patience = self._beyond, CachePolicy.patience
        if self.most_free is None or need <= self.most_free or beyond.most_free != self.most_free:
            return None
        was_tried = beyond.asked_at - beyond.since >= patience
        if not was_tried or self._runtime.monotonic() - beyond.asked_at >= patience:
            return None
        return (
            f"the session needs {_tokens(need)} of its cache, where {self.most_free:,} are the most that were seen "
            f"free, for {patience:g} s"
        )

    def never_opens(self) -> str | None:
        """Return why no session is to be opened there, ever; None: one may be, perhaps later."""
        return self._closed_for if self._closed_until == math.inf else None


def _tokens(need: int) -> str:
    return f"{need:,} tokens (rows x positions x blocks)"
