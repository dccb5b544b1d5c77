"""Whether a server's sessions go back to where they say, held against what it answers in one call."""

import asyncio
import logging
from typing import NamedTuple

from petals_eval.errors import PeerDisagreesError, PeerNoSessionError, PeerTimeoutError
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.arbiter import ArbiterPolicy
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.trust.tolerance import excess, relative_difference

__all__ = ["LaneTrust"]

_log = logging.getLogger(__name__)


class _Apart(NamedTuple):
    """How far two answers are from each other: for a person to read, and by what rounding explains."""

    relative: float
    excess: float


class LaneTrust:
    """Accepts what a lane answered after it went back. Used from the connection's event loop only."""

    def __init__(self, client: HopClient, acceptance: Acceptance, quarantine: Quarantine, peers: PeerBook):
        self._client = client
        self._acceptance = acceptance
        self._quarantine = quarantine
        self._peers = peers
        self._settings, self._runtime = peers.settings, peers.runtime

    async def accept(self, call: RecordedCall, *, went_back: bool) -> None:
        """Count the answer of one server, and choose whether to audit it, or raise.

        call: all positions of the rows, those of the prefix included. Its tensors may change when this returns.
        went_back: whether the session had gone back for it.

        The first such answer of a server is believed when it equals that of a forward call on the same server; a server
        whose does not is not used for lanes, and nothing has counted yet (PeerNoSessionError). Later ones are sampled,
        as audits are; a server that is found out then is left out for good (PeerDisagreesError). Raises PeerError also
        where it cannot be asked.
        """
        peer = self._peers.of(call.hop.peer_id)
        if went_back:
            await self._check(peer, call)
        await self._acceptance.offer(call, is_lent=True)
        self._acceptance.refuse_distrusted(peer)

    async def _check(self, peer: Peer, call: RecordedCall) -> None:
        goes_back = peer.lanes.goes_back
        is_first = not goes_back.is_answered
        if not await goes_back.get(lambda: self._first(peer, call)):
            raise PeerNoSessionError("its sessions do not go back to a position as they should")
        if is_first or self._runtime.random.random() >= self._settings.verify:
            return
        apart = await self._apart(call)
        if apart is None:
            return
        error = PeerDisagreesError(
            f"after going back in a session it answered otherwise than in one call (difference {apart.relative:.2g}, "
            f"{apart.excess:.2g} times what rounding explains)",
            apart.relative,
        )
        finding = TrustFinding(call.hop.server, "wrong", call.hop.span, apart.relative, apart.excess, witness="call")
        self._quarantine.add_finding(finding, error)
        raise error

    async def _first(self, peer: Peer, call: RecordedCall) -> bool:
        """Return whether a server's first answer after it went back is to be believed."""
        apart = await self._apart(call)
        if apart is None:
            return True
        self._quarantine.tell(
            f"warning: the sessions of server {peer.name} do not go back to a position as they should (difference "
            f"{apart.relative:.2g}): it is asked by forward calls alone. Nothing of theirs has counted."
        )
        return False

    async def _apart(self, call: RecordedCall) -> _Apart | None:
        """Ask the server one of the rows in one call; return how far that is from its answer, None where rounding
        explains it. Raises PeerError."""
        row = self._runtime.random.randrange(call.activations.rows)  # which one it cannot know
        asked, before = call.activations.by_rows(1)[row], call.answer[row : row + 1]
        timeout = min(self._settings.request_timeout, ArbiterPolicy.patience + 10 * call.seconds)
        try:
            async with asyncio.timeout(timeout):
                answer = (await self._client.run(call.hop, asked, lossless=True)).hidden
        except TimeoutError as error:
            raise PeerTimeoutError(f"no answer to a check within {timeout:g} s") from error
        kinds = call.kind, call.kind
        found: float = await self._runtime.in_thread(excess, asked.hidden, before, answer, kinds)
        _log.debug("%s: after going back, %.2g times what rounding explains", short_peer(call.hop.peer_id), found)
        return None if found <= 1 else _Apart(relative_difference(asked.hidden, before, answer), found)
