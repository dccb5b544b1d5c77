"""Calls to servers in evaluation mode only: each is asked one question twice before its first call, and later again."""

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerError, PeerNondeterministicError, PeerRefusedError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.push import Pushed
from petals_eval.swarm.transport.rpc import Answer, together
from petals_eval.swarm.trust.determinism import TOLERANCE, difference, question_from

__all__ = ["CheckedCalls"]

_EARLY = 1024
"""Tokens a server has computed when it is asked again for the first time: about a micro-batch."""


@dataclass(slots=True)
class _Standing:
    """What a server was asked, as it is announced now: one that moves to other blocks has loaded them anew.

    asked: by the blocks that were asked. tokens: computed so far. again_at: tokens at which it is asked again.
    """

    asked: dict[tuple[int, int], asyncio.Task[None]] = field(default_factory=dict)
    tokens: int = 0
    again_at: float = _EARLY


class CheckedCalls:
    """`BlockCalls` that raise PeerNondeterministicError for a server that gives one question two answers.

    The question is a corner of the hidden states on their way to the server (`question_from`), in two calls. Equal bits
    prove that no dropout is active: two masks are never equal. Unequal ones are held against what the dtype's rounding
    explains. Where that could be it, the blocks are asked one by one: rounding stays what it is, while dropout in a
    single block is no longer thinned by what the others do.

    tokens_asked, tokens_computed: what the checks have cost so far, and what they were for.
    """

    def __init__(self, calls: BlockCalls, peers: PeerBook, settings: SwarmSettings):
        self._calls = calls
        self._peers = peers
        self._settings = settings
        self._limits = TokenLimits(settings.max_tokens_per_call)
        self._standings: dict[tuple[str, int, int], _Standing] = {}
        self._caught: dict[str, PeerNondeterministicError] = {}
        self.tokens_asked = 0
        self.tokens_computed = 0

    async def forward(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, *, lossless: bool = False
    ) -> Answer:
        await self._ready(hop, hidden)
        answer = await self._calls.forward(hop, hidden, prompts, lossless=lossless)
        self._refuse_if_caught(hop)  # while this was computed
        self._computed(hop, hidden)
        return answer

    async def forward_in_steps(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, step: int) -> Answer:
        await self._ready(hop, hidden)
        answer = await self._calls.forward_in_steps(hop, hidden, prompts, step)
        self._refuse_if_caught(hop)
        self._computed(hop, hidden)
        return answer

    async def push(self, hops: Sequence[Hop], hidden: torch.Tensor, timeout: float) -> Pushed:
        """Only the first server is asked before: what the others are given is known when they have answered."""
        try:
            await self._ready(hops[0], hidden)
        except PeerError as error:
            return Pushed((), error, 0)
        pushed = await self._calls.push(hops, hidden, timeout)
        for index, answer in enumerate(pushed.answers):
            hop = hops[index]
            try:
                if index > 0:
                    await self._clear(hop, hidden)
                self._refuse_if_caught(hop)
            except PeerError as error:
                return Pushed(pushed.answers[:index], error, index)
            self._computed(hop, hidden)
            hidden = answer.hidden
        return pushed

    async def session(self, hop: Hop, batch: int, max_length: int) -> HopSession:
        session = await self._calls.session(hop, batch, max_length)
        session.before_first_step = functools.partial(self._clear, hop)
        return session

    async def rolls_back(self, hop: Hop, hidden_size: int) -> bool:
        return await self._calls.rolls_back(hop, hidden_size)

    def forget(self, peer_id: str) -> None:
        for (peer, _, _), standing in self._standings.items():
            if peer == peer_id:
                standing.asked.clear()
        self._calls.forget(peer_id)

    def _standing(self, hop: Hop) -> _Standing:
        server = hop.server
        return self._standings.setdefault((server.peer_id, server.start, server.end), _Standing())

    def _computed(self, hop: Hop, hidden: torch.Tensor) -> None:
        tokens = hidden.shape[0] * hidden.shape[1]
        self.tokens_computed += tokens
        self._standing(hop).tokens += tokens

    async def _ready(self, hop: Hop, hidden: torch.Tensor) -> None:
        """`_clear`, for a call that leaves when this returns."""
        await self._clear(hop, hidden)
        self._peers.of(hop.server.peer_id).flow.begins(time.monotonic())

    async def _clear(self, hop: Hop, hidden: torch.Tensor) -> None:
        """Return once the server has answered one question twice alike; concurrent callers share its first check."""
        self._refuse_if_caught(hop)
        if hidden.numel() == 0 or hop.server.peer_id in self._caught:
            return
        standing = self._standing(hop)
        task = _covering(standing.asked, hop)
        if task is None:
            task = asyncio.create_task(self._ask(hop, question_from(hidden)))
            task.add_done_callback(_look_at)
            standing.asked[hop.first, hop.last] = task
        elif standing.tokens >= standing.again_at and self._settings.recheck_share > 0:
            question = question_from(hidden)
            cost = 2 * question.shape[0] * question.shape[1]
            standing.again_at = standing.tokens + cost / self._settings.recheck_share
            await self._ask(hop, question)
        await asyncio.shield(task)

    def _refuse_if_caught(self, hop: Hop) -> None:
        """Raise what it was caught with, unless it was left out and is called all the same: that is a last resort."""
        error = self._caught.get(hop.server.peer_id)
        if error is not None and not (
            self._settings.allow_nondeterministic and self._peers.is_left_out(hop.server.peer_id)
        ):
            raise error

    async def _ask(self, hop: Hop, question: torch.Tensor) -> None:
        """Ask the hop's blocks one question twice.

        Raises PeerNondeterministicError, and PeerError when the server cannot be asked.
        """
        answer, found, allowed = await self._ask_twice(hop, question)
        if 0 < found <= allowed and hop.last - hop.first > 1:
            for block in range(hop.first, hop.last):
                alone = Hop(hop.server, block, block + 1)
                answer, of_block, allowed = await self._ask_twice(alone, question)
                found = max(found, of_block)
                question = answer
        if found > allowed:
            error = PeerNondeterministicError(
                f"it gave two answers to one question (difference {found:.2g}, rounding explains {allowed:g})", found
            )
            self._caught[hop.server.peer_id] = error
            raise error

    async def _ask_twice(self, hop: Hop, question: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """One answer, the difference of the two, and what rounding explains."""
        peer_id = hop.server.peer_id
        while True:
            # Small as the question is, an operator may have set a limit below it.
            limit = self._limits.per_call(peer_id) or USUAL_MAX_TOKENS
            question = question[:, :limit]
            parts = question.split(max(1, limit // question.shape[1]))
            tokens = parts[0].shape[0] * parts[0].shape[1]
            try:
                answers = await together([self._calls.forward(hop, part, None, lossless=True) for part in parts * 2])
                break
            except PeerRefusedError as error:
                if not self._limits.learn_per_call(peer_id, error, tokens):
                    raise
        self._peers.of(peer_id).flow.measured(min(answer.seconds for answer in answers))
        self.tokens_asked += 2 * question.shape[0] * question.shape[1]
        first = torch.cat([answer.hidden for answer in answers[: len(parts)]])
        second = torch.cat([answer.hidden for answer in answers[len(parts) :]])
        return first, difference(question, first, second), TOLERANCE[first.dtype]


def _covering(asked: dict[tuple[int, int], asyncio.Task[None]], hop: Hop) -> asyncio.Task[None] | None:
    """The question to all of the hop's blocks that was answered in order, or is on its way."""
    for (first, last), task in asked.items():
        if first <= hop.first and hop.last <= last and not (task.done() and (task.cancelled() or task.exception())):
            return task
    return None


def _look_at(task: asyncio.Task[None]) -> None:
    """Whoever waited for it was told; asyncio would complain of an error nobody looked at when all of them left."""
    if not task.cancelled():
        task.exception()
