"""Opening sessions: what a server may be asked, for how long, and what it means when it gives none. Nobody waits here.

The cache is reserved by a step of no positions before anything is computed. A server answers it without computing, so
that it can have a time limit of its own: a full cache, a locked one and a server that fails are told apart, and whoever
is refused has uploaded nothing. It costs a round trip, and one for all of a route that is opened together: on real
2.2.0 servers 5 ms beside us, and 47 ms at 20 ms each way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from hivemind.p2p import P2P

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerCacheFullError, PeerError, PeerNoSessionError, PeerRefusedError, PeerTimeoutError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.caches import CacheBook
from petals_eval.swarm.peers.limits import says_cache_is_full
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import open_stream
from petals_eval.swarm.wire import messages as wire

__all__ = ["SessionOpener", "all_or_none"]

AskInfo = Callable[[str, int], Awaitable[wire.ServerInfo]]
"""(peer id, block) -> what the server says now; raises PeerError."""


class SessionOpener:
    """Opens sessions on the servers of one connection, and notes in `caches` what comes of it.

    ask_info: asks anew, whatever was asked before.
    """

    def __init__(self, p2p: P2P, dht_prefix: str, settings: SwarmSettings, caches: CacheBook, ask_info: AskInfo):
        self._p2p = p2p
        self._prefix = dht_prefix
        self._settings = settings
        self._caches = caches
        self._ask_info = ask_info

    def check(self, hop: Hop, info: wire.ServerInfo) -> None:
        """Raises PeerNoSessionError where no session is to be opened, which costs the server nothing."""
        peer_id = hop.server.peer_id
        layout = wire.other_layout(info)
        if layout is not None:
            self._caches.incompatible(peer_id, layout)
            raise PeerNoSessionError(layout)
        closed = self._caches.wait(peer_id, 0)  # for so little nothing but a lost lock is waited for
        if closed is not None:
            raise PeerNoSessionError(closed.why)

    async def open(self, hop: Hop, info: wire.ServerInfo, batch: int, max_length: int) -> HopSession:
        """A session on the hop's blocks for `batch` rows of `max_length` positions, its cache reserved.

        Raises PeerCacheFullError where there is no room now, PeerNoSessionError where the server opens none that is for
        us, and other PeerErrors for what fails.
        """
        self.check(hop, info)
        peer_id = hop.server.peer_id
        self._caches.claimed(hop.server)
        need = batch * max_length * (hop.last - hop.first)
        session = HopSession(
            partial(open_stream, self._p2p, peer_id, "rpc_inference"),
            wire.block_uid(self._prefix, hop.first, hop.last),
            info,
            batch=batch,
            opening=wire.session_metadata(max_length, self._settings.active_adapter),
            timeout=self._settings.request_timeout,
            on_end=partial(self._caches.ended, peer_id),
        )
        if not self._caches.is_full(peer_id, need):
            await self._reserve(session, hop, need)
            return session
        async with self._caches.turn(peer_id):
            if not self._caches.may_be_asked(peer_id, need):  # somebody else was refused meanwhile
                raise PeerCacheFullError(self._caches.why_full(peer_id, need))
            await self._reserve(session, hop, need, await self._look(hop, need))
            return session

    async def _look(self, hop: Hop, need: int) -> int | None:
        """What is free now, as the server says. Where that is too little it need not be asked for a session, of which
        each refusal leaves a traceback in its log. Raises PeerCacheFullError then."""
        free = (await self._ask_info(hop.server.peer_id, hop.first)).cache_tokens_available
        if free is not None and free < need:
            words = f"{free:,} tokens of its cache are free"
            self._caches.refused(hop.server.peer_id, need, words)
            raise PeerCacheFullError(self._caches.why_full(hop.server.peer_id, need))
        return free

    async def _reserve(self, session: HopSession, hop: Hop, need: int, shown_free: int | None = None) -> None:
        peer_id = hop.server.peer_id
        try:
            await session.open(self._settings.connect_timeout)
        except BaseException as error:
            await session.close()
            if isinstance(error, PeerTimeoutError):
                raise await self._meaning_of(error, hop) from error
            if isinstance(error, PeerRefusedError) and says_cache_is_full(error):
                self._caches.refused(peer_id, need, str(error), shown_free=shown_free)
                raise PeerCacheFullError(self._caches.why_full(peer_id, need)) from error
            raise
        self._caches.opened(peer_id, need)

    async def _meaning_of(self, silence: PeerTimeoutError, hop: Hop) -> PeerError:
        """Of no answer to the opening of a session: a server that goes on with all else has lost the lock of its cache.
        Any other is one that fails."""
        try:
            await self._ask_info(hop.server.peer_id, hop.first)
        except PeerError:
            return silence
        seconds = self._settings.connect_timeout
        return PeerNoSessionError(
            self._caches.locked(
                hop.server.peer_id, f"it opens no session within {seconds:g} s, and answers rpc_info all the while"
            )
        )


async def all_or_none(openings: Sequence[Coroutine[Any, Any, HopSession]]) -> list[HopSession | PeerError]:
    """Open them together. Where one fails the others are closed: no cache is held while another is waited for.

    Returns of each the session, which is closed again where there is an error among them, or the error.
    """
    tasks = [asyncio.create_task(_or_error(opening)) for opening in openings]
    try:
        await asyncio.wait(tasks)
        opened = [task.result() for task in tasks]
    except BaseException:
        await _close_all(tasks)
        raise
    if any(isinstance(each, PeerError) for each in opened):
        await _close_all(tasks)
    return opened


async def _or_error(opening: Coroutine[Any, Any, HopSession]) -> HopSession | PeerError:
    try:
        return await opening
    except PeerError as error:
        return error


async def _close_all(openings: Sequence["asyncio.Task[HopSession | PeerError]"]) -> None:
    """Give up those under way, and close those that are open."""
    for task in openings:
        task.cancel()
    await asyncio.wait(openings)
    opened = [task.result() for task in openings if not task.cancelled() and task.exception() is None]
    closing = [asyncio.create_task(each.close()) for each in opened if isinstance(each, HopSession)]
    if closing:
        await asyncio.wait(closing)
