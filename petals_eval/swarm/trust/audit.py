"""Calls a share of which is computed again elsewhere, beside the work and never in its way."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerDisagreesError, PeerDistrustedError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.push import Pushed
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.trust.arbiter import BlocksAtHome, Claim, Finding, Judge, Sight
from petals_eval.swarm.trust.sampling import Sampler

__all__ = ["Checks", "VerifiedCalls"]

_AT_ONCE = 4
"""Checks under way together; others wait their turn."""
_MOST_WAITING = 64
"""Checks that may wait, each with its hidden states. Above it calls wait: it takes a share so large that the others
are kept as busy with checks as with work."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What was checked so far.

    computed: micro-batches that came back. done: of these, computed elsewhere, too. under_way: being so, or waiting.
    impossible: not done, because nobody who holds the blocks answered.
    """

    computed: int
    done: int
    under_way: int
    impossible: int


class VerifiedCalls:
    """`BlockCalls` of which a share, `settings.verify`, is computed again by others that hold the same blocks.

    on_finding: called, in the event loop, with everything that comes of it. A server that is wrong is left out of the
    peer book before that, and what it still answers raises PeerDisagreesError.
    on_distrusted: called with servers that raised such an error in the calls of a check.

    Sessions are not checked, except where `forward_in_steps` uses one: their answers depend on what went before. Nor is
    anything on a lossy wire: the code's own error would hide what is to be found.
    """

    def __init__(
        self,
        calls: BlockCalls,
        directory: Sight,
        peers: PeerBook,
        settings: SwarmSettings,
        *,
        on_finding: Callable[[Finding], object] = lambda finding: None,
        on_distrusted: Callable[[Hop, PeerDistrustedError], object] = lambda hop, error: None,
        seed: int | None = None,
    ):
        self._calls = calls
        self._peers = peers
        self._settings = settings
        self._draws = random.Random(seed)  # None: a server must not be able to guess
        self._judge = Judge(calls, directory, peers, settings, self._draws, self._distrusted)
        self._samplers: dict[tuple[str, int, int], Sampler[Claim]] = {}
        self._caught: dict[str, PeerDisagreesError] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._computed = self._done = self._impossible = 0
        self._findings: dict[tuple[str, str], Finding] = {}
        self.on_finding = on_finding
        self.on_distrusted = on_distrusted

    def keep_at_home(self, blocks: BlocksAtHome) -> None:
        """Hold servers of these blocks against them."""
        self._judge.home = blocks

    def limit_steps(self, positions: int | None) -> None:
        """Check nothing of more positions in steps (`TokenLimits.steps_alike`)."""
        self._judge.limits.steps_alike = positions

    async def forward(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, *, lossless: bool = False
    ) -> Answer:
        self._refuse_if_caught(hop)
        answer = await self._calls.forward(hop, hidden, prompts, lossless=lossless)
        await self._seen(Claim(hop, hidden, prompts, answer.hidden, None, answer.seconds))
        return answer

    async def forward_in_steps(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, step: int) -> Answer:
        self._refuse_if_caught(hop)
        answer = await self._calls.forward_in_steps(hop, hidden, prompts, step)
        await self._seen(Claim(hop, hidden, prompts, answer.hidden, step, answer.seconds))
        return answer

    async def push(self, hops: Sequence[Hop], hidden: torch.Tensor, timeout: float) -> Pushed:
        for index, hop in enumerate(hops):
            if (error := self._caught.get(hop.server.peer_id)) is not None:
                return Pushed((), error, index)
        pushed = await self._calls.push(hops, hidden, timeout)
        for index, answer in enumerate(pushed.answers):
            try:
                await self._seen(Claim(hops[index], hidden, None, answer.hidden, None, answer.seconds))
            except PeerDisagreesError as error:
                return Pushed(pushed.answers[:index], error, index)
            hidden = answer.hidden
        return pushed

    async def session(self, hop: Hop, batch: int, max_length: int) -> HopSession:
        self._refuse_if_caught(hop)
        return await self._calls.session(hop, batch, max_length)

    async def rolls_back(self, hop: Hop, hidden_size: int) -> bool:
        return await self._calls.rolls_back(hop, hidden_size)

    def forget(self, peer_id: str) -> None:
        self._calls.forget(peer_id)

    def findings(self) -> tuple[Finding, ...]:
        """What was found so far: of each server and verdict the last."""
        return tuple(self._findings.values())

    def checks(self) -> Checks:
        """How much was checked so far."""
        return Checks(self._computed, self._done, len(self._tasks), self._impossible)

    async def settle(self) -> None:
        """Wait for every check, and see to it that every server had its two where it computed as many.

        Checks that are not done by `settings.deadline` are given up.
        """
        for sampler in self._samplers.values():
            claim = sampler.last_choice()
            if claim is not None and not self._peers.is_left_out(claim.peer_id):
                self._start(claim, sampler)
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=self._settings.deadline)
        for task in late:
            task.cancel()
        self._impossible += len(late)

    async def _seen(self, claim: Claim) -> None:
        """Choose whether to check an answer. Raises PeerDisagreesError where its server was caught in the meantime."""
        self._refuse_if_caught(claim.hop)
        if claim.question.numel() == 0 or self._settings.verify == 0 or self._settings.wire is not None:
            return
        self._computed += 1
        server = claim.hop.server
        key = (server.peer_id, server.start, server.end)
        sampler = self._samplers.get(key)
        if sampler is None:
            sampler = self._samplers[key] = Sampler(self._settings.verify, self._draws)
        if sampler.chooses(claim, possible=self._judge.can_check(claim.hop)):
            self._start(claim, sampler)
            if len(self._tasks) > _MOST_WAITING:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                self._refuse_if_caught(claim.hop)

    def _start(self, claim: Claim, sampler: Sampler[Claim]) -> None:
        task = asyncio.create_task(self._check(claim, sampler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, claim: Claim, sampler: Sampler[Claim]) -> None:
        async with self._turns:
            if self._peers.is_left_out(claim.peer_id):
                return
            found = await self._judge.check(claim)
        if found is None:
            self._impossible += 1
            sampler.failed()
            return
        self._done += 1
        for finding in found:
            self._note(finding)

    def _distrusted(self, hop: Hop, error: PeerDistrustedError) -> None:
        self.on_distrusted(hop, error)

    def _note(self, finding: Finding) -> None:
        peer_id = finding.server.peer_id
        if self._peers.is_left_out(peer_id):
            return
        self._findings[peer_id, finding.verdict] = finding
        if finding.verdict == "liar":
            error = PeerDisagreesError(
                f"it answered otherwise than {_witness(finding)} (difference {finding.difference:.2g}, "
                f"{finding.excess:.2g} times what rounding explains)",
                finding.difference,
            )
            self._caught[peer_id] = error
            self._peers.leave_out(peer_id, error)
        self.on_finding(finding)

    def _refuse_if_caught(self, hop: Hop) -> None:
        error = self._caught.get(hop.server.peer_id)
        if error is not None:
            raise error


def _witness(finding: Finding) -> str:
    if finding.witness == "home":
        return "the same blocks at home"
    return "itself when it was asked again" if finding.witness == "itself" else "two others"
