"""The replica audit: a share of the answers is computed again elsewhere, beside the work and never in its way."""

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

from petals_eval.errors import PeerDisagreesError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.peers.sampling import Sampler
from petals_eval.swarm.trust.arbiter import Arbiter, BlocksAtHome
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.wire.span import Span

__all__ = ["AuditPolicy", "AuditProgress", "ReplicaAudit", "catch_probability"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditPolicy:
    """How many audits there may be.

    at_once: under way together; others wait their turn.
    max_waiting: audits that may wait, each with its hidden states. Above it calls wait: it takes a share so large that
        the others are kept as busy with audits as with work.
    """

    at_once: int = 4
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class AuditProgress:
    """What was audited so far.

    computed: answers that came back. done: of these, computed elsewhere, too. under_way: being so, or waiting.
    impossible: not done, because nobody who holds the blocks answered.
    """

    computed: int
    done: int
    under_way: int
    impossible: int


class ReplicaAudit:
    """Used from the connection's event loop only; `progress` from any thread.

    computed: answers that came back.
    """

    def __init__(self, arbiter: Arbiter, peers: PeerBook, quarantine: Quarantine):
        self._arbiter = arbiter
        self._peers = peers
        self._quarantine = quarantine
        self._settings, self._runtime = peers.settings, peers.runtime
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order
        self._turns = asyncio.Semaphore(AuditPolicy.at_once)
        self._done = self._impossible = 0
        self.computed = 0

    def keep_at_home(self, blocks: BlocksAtHome) -> None:
        """Hold servers of these blocks against them."""
        self._arbiter.home = blocks

    def progress(self) -> AuditProgress:
        """Return how much was audited so far."""
        return AuditProgress(self.computed, self._done, len(self._tasks), self._impossible)

    def new_sampler(self, peer: Peer, span: Span) -> Sampler[object]:
        """Begin to choose among a server's answers for a span that it announces."""
        return peer.samplers.setdefault(span, Sampler(self._settings.verify, self._runtime.random))

    def can_check(self, hop: Hop) -> bool:
        """Return whether anybody else holds these blocks, now or in a moment, or home some of them."""
        return self._arbiter.can_check(hop)

    async def start(self, peer: Peer, call: RecordedCall) -> None:
        """Start an audit; wait only where too many are under way."""
        self._start(peer, call)
        if len(self._tasks) > AuditPolicy.max_waiting:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def settle(self) -> None:
        """Wait for every audit, and see to it that every server had its two where it computed as many.

        Audits that are not done by `settings.deadline` are given up.
        """
        for peer in list(self._peers.values()):
            for sampler in peer.samplers.values():
                call = sampler.last_choice()
                if call is not None and not peer.is_quarantined:
                    self._start(peer, cast(RecordedCall, call))
        if not self._tasks:
            return
        tasks = list(self._tasks)
        _, late = await asyncio.wait(tasks, timeout=self._settings.deadline)
        for task in tasks:
            if task in late:
                task.cancel()
        self._impossible += len(late)

    def _start(self, peer: Peer, call: RecordedCall) -> None:
        task = asyncio.create_task(self._check(peer, call))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def _check(self, peer: Peer, call: RecordedCall) -> None:
        async with self._turns:
            if peer.is_quarantined:
                return
            found = await self._arbiter.check(call)
        if found is None and (seconds := self._arbiter.until_others(call.hop)) is not None:
            await asyncio.sleep(seconds)  # out of turn: those who hold the blocks are left alone for a moment
            async with self._turns:
                found = await self._arbiter.check(call)
        outcome = "nobody could compute it again" if found is None else "differs" if found else "agrees"
        _log.debug("%s: audit of blocks %s: %s", peer.name, call.hop.span, outcome)
        if found is None:
            self._impossible += 1
            peer.samplers[call.hop.server.span].on_failed()
            return
        self._done += 1
        for finding in found:
            self._note(finding)

    def _note(self, finding: TrustFinding) -> None:
        if finding.status == "disputed":
            if not self._peers.of(finding.server.peer_id).is_quarantined:
                self._quarantine.add_dispute(finding)
            return
        error = PeerDisagreesError(
            f"it answered otherwise than {_witness(finding)} (difference {finding.difference:.2g}, "
            f"{finding.excess:.2g} times what rounding explains)",
            finding.difference,
        )
        self._quarantine.add_finding(finding, error)


def _witness(finding: TrustFinding) -> str:
    if finding.witness == "home":
        return "the same blocks at home"
    return "itself when it was asked again" if finding.witness == "itself" else "two others"


def catch_probability(p: float, n: int, share: float) -> float:
    """Return the probability that a server is caught that corrupts each of its n micro-batches with probability p.

    share: of its micro-batches that is checked, as `SwarmSettings.verify`.

    One of the first two micro-batches is checked, each of the others with probability `share`, and where that comes to
    none, one of them at the end of the run. A corrupted one that is checked is caught. With s = share, m = n - 1:

        not caught = (1 - p) ((1 - s p)^m - p (1 - s)^m)     for n > 1;    1 - p for n = 1

    A server that is also asked to check others can be caught there, too; that comes on top.

    >>> round(catch_probability(1.0, 2, 0.02), 3), round(catch_probability(0.01, 1, 0.02), 3)
    (1.0, 0.01)
    >>> [round(catch_probability(0.1, n, 0.02), 2) for n in (2, 10, 100, 1000, 3000)]
    [0.19, 0.19, 0.27, 0.88, 1.0]
    """
    if n < 1:
        return 0.0
    others = n - 1
    missed = 1 - p if not others else (1 - p) * ((1 - share * p) ** others - p * (1 - share) ** others)
    return 1 - missed
