"""Opening sessions: what a server may be asked, for how long, and what it means when it gives none. Nobody waits here.

The cache is reserved by a step of no positions before anything is computed. A server answers it without computing, so
that it can have a time limit of its own: a full cache, a locked one and a server that fails are told apart, and whoever
is refused has uploaded nothing. It costs a round trip, and one for all of a route that is opened together: on real
2.2.0 servers 5 ms beside us, and 47 ms at 20 ms each way.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from anyio import CancelScope

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerCacheFullError, PeerError, PeerNoSessionError, PeerRefusedError, PeerTimeoutError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import says_cache_is_full
from petals_eval.swarm.peers.peer import Peer
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.transport import Transport, ask_info, kept_info
from petals_eval.swarm.wire.server_info import ServerInfo, other_layout

__all__ = ["SessionOpener", "all_or_none"]


class SessionOpener:
    """Opens sessions, and notes in the peer's cache what comes of it."""

    def __init__(self, transport: Transport, settings: SwarmSettings):
        self._transport = transport
        self._settings = settings

    async def open(self, peer: Peer, hop: Hop, rows: int, positions: int) -> HopSession:
        """Return a session on the hop's blocks with its cache reserved.

        Raises PeerCacheFullError where there is no room now, PeerNoSessionError where the server opens none that is for
        us, and other PeerErrors for what fails.
        """
        await self.check(peer, hop)
        peer.cache.observe_record(hop.server.record)
        need = rows * positions * hop.blocks
        if not peer.cache.is_full(need):
            return await self._reserve(peer, hop, rows, positions)
        async with peer.cache.turn:
            if not peer.cache.may_be_asked(need):  # somebody else was refused meanwhile
                raise PeerCacheFullError(peer.cache.why_full(need))
            return await self._reserve(peer, hop, rows, positions, await self._look(peer, hop, need))

    async def check(self, peer: Peer, hop: Hop) -> ServerInfo:
        """Return what the server says of itself, asked once.

        Raises PeerNoSessionError where no session is to be opened, which costs the server nothing, and other PeerErrors
        where it cannot be asked.
        """
        info = await kept_info(self._transport, peer, hop.span.start, self._settings)
        layout = other_layout(info)
        if layout is not None:
            peer.cache.on_incompatible(layout)
            raise PeerNoSessionError(layout)
        closed = peer.cache.wait(0)  # for so little nothing but a lost lock is waited for
        if closed is not None:
            raise PeerNoSessionError(closed.why)
        return info

    async def _look(self, peer: Peer, hop: Hop, need: int) -> int | None:
        """Return what is free now, as the server says.

        Where that is too little it need not be asked for a session, of which each refusal leaves a traceback in its
        log. Raises PeerCacheFullError then.
        """
        free = (await ask_info(self._transport, peer, hop.span.start)).cache_tokens_available
        if free is not None and free < need:
            peer.cache.on_full(need, f"{free:,} tokens of its cache are free")
            raise PeerCacheFullError(peer.cache.why_full(need))
        return free

    async def _reserve(
        self, peer: Peer, hop: Hop, rows: int, positions: int, shown_free: int | None = None
    ) -> HopSession:
        need = rows * positions * hop.blocks
        try:
            session = await self._transport.open_session(hop, rows, positions)
        except PeerTimeoutError as error:
            raise await self._meaning_of(error, peer, hop) from error
        except PeerRefusedError as error:
            if not says_cache_is_full(error):
                raise
            peer.cache.on_full(need, str(error), shown_free=shown_free)
            raise PeerCacheFullError(peer.cache.why_full(need)) from error
        peer.cache.on_opened(need)
        session.add_close_callback(partial(peer.cache.on_ended, need))
        return session

    async def _meaning_of(self, silence: PeerTimeoutError, peer: Peer, hop: Hop) -> PeerError:
        """Return what no answer to the opening of a session means: a server that goes on with all else has lost the
        lock of its cache. Any other is one that fails."""
        try:
            await ask_info(self._transport, peer, hop.span.start)
        except PeerError:
            return silence
        seconds = self._settings.connect_timeout
        return PeerNoSessionError(
            peer.cache.on_locked(f"it opens no session within {seconds:g} s, and answers rpc_info all the while")
        )


async def all_or_none(openings: Sequence[Coroutine[Any, Any, HopSession]]) -> list[HopSession | PeerError]:
    """Open sessions together. Where one fails the others are closed: no cache is held while another is waited for.

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
    with CancelScope(shield=True):  # whoever is cancelled here would leave them reserved
        await asyncio.wait(openings)
        opened = [task.result() for task in openings if not task.cancelled() and task.exception() is None]
        closing = [asyncio.create_task(each.close()) for each in opened if not isinstance(each, PeerError)]
        if closing:
            await asyncio.wait(closing)
