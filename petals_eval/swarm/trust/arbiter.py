"""Computes a hop again elsewhere, and where the answers differ finds out who is wrong."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerDistrustedError, PeerError, PeerRefusedError, PeerTimeoutError
from petals_eval.swarm.directory.routing import Hop, plan_route
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.transport.rpc import together
from petals_eval.swarm.trust.tolerance import Kind, allowed, excess, relative_difference
from petals_eval.swarm.wire.records import Snapshot, SpanServer

__all__ = ["BlocksAtHome", "Claim", "Finding", "Judge", "Sight"]

_MOST_THIRDS = 4
"""Others asked, one after the other, until two of them agree."""
_PATIENCE = 20.0
"""Seconds a call of a check may take besides ten times what the call took that is checked: nobody waits for a check
but the end of a run, and a server that hangs must not hold that up for as long as a call of the run may take."""


class BlocksAtHome(Protocol):
    """Blocks first:last in this process."""

    first: int
    last: int

    def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None, *, first: int, last: int) -> torch.Tensor:
        """Hidden states (batch, seq, hidden) through blocks first:last. May take long: it is called in a thread."""
        ...


class Sight(Protocol):
    """Who is there: the directory."""

    snapshot: Snapshot


@dataclass(frozen=True, eq=False)
class Claim:
    """What a server says its blocks make of hidden states.

    question, answer: (batch, seq, hidden). prompts: (blocks of the hop, batch or 1, prefix, hidden) or None.
    step: positions at a time where it was computed in a session, or None. seconds: it took.
    """

    hop: Hop
    question: torch.Tensor
    prompts: torch.Tensor | None
    answer: torch.Tensor
    step: int | None = None
    seconds: float = 0.0

    @property
    def peer_id(self) -> str:
        return self.hop.server.peer_id

    @property
    def kind(self) -> Kind:
        return Kind.of(self.answer.dtype, self.hop.server.record.quant_type)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check came to.

    verdict: "liar": this server is wrong, for two others say so, blocks at home, or itself when asked again.
        "disputed": it and `others` disagree, and there is nobody to settle it.
    difference: of the answers, relative to what the blocks did. excess: how many times what rounding explains.
    others: who it was held against. first, last: the blocks in question.
    """

    verdict: Literal["liar", "disputed"]
    server: SpanServer
    first: int
    last: int
    difference: float
    excess: float
    others: tuple[str, ...]
    witness: Literal["others", "home", "itself"] = "others"


Opinion = tuple[Claim, ...]
"""The same blocks as some claim's, on one server or on several in a row."""


class Judge:
    """Checks claims. `calls` are made like those of the work itself: a server cannot tell them apart.

    on_distrusted: told of servers that a check's own call found to run in training mode.
    """

    def __init__(
        self,
        calls: BlockCalls,
        directory: Sight,
        peers: PeerBook,
        settings: SwarmSettings,
        draws: random.Random,
        on_distrusted: Callable[[Hop, PeerDistrustedError], object],
    ):
        self._calls = calls
        self._directory = directory
        self._peers = peers
        self._settings = settings
        self.limits = TokenLimits(settings.max_tokens_per_call)
        self._draws = draws
        self._at_home = asyncio.Lock()
        self._on_distrusted = on_distrusted
        self.home: BlocksAtHome | None = None

    def can_check(self, hop: Hop) -> bool:
        """Whether anybody else holds these blocks now, or home some of them."""
        return self._home_part(hop) is not None or self._others(hop, {hop.server.peer_id}) is not None

    async def check(self, claim: Claim) -> tuple[Finding, ...] | None:
        """What came of computing the claim again; nothing found means that they agree, None that nobody could."""
        part = self._home_part(claim.hop)
        at_home = None if part is None else await self._check_at_home(claim, *part)
        if at_home or (at_home is not None and part == (claim.hop.first, claim.hop.last)):
            return at_home
        unable: set[str] = set()
        opinion = await self._opinion(claim, {claim.peer_id}, unable)
        if opinion is None:
            return at_home
        if await _agree(claim, opinion):
            return ()
        return await self._settle(claim, opinion, unable)

    # -- who is wrong

    async def _settle(self, claim: Claim, other: Opinion, unable: set[str]) -> tuple[Finding, ...]:
        """The claim and another opinion differ. An honest server repeats itself; a third one sides with the right."""
        liars = [found for each in (claim, *other) if (found := await self._contradicts_itself(each)) is not None]
        if liars:
            return tuple(liars)
        asked = {claim.peer_id, *_servers(other)}
        for _ in range(_MOST_THIRDS):
            third = await self._opinion(claim, asked, unable)
            if third is None:
                break
            asked |= _servers(third)
            with_claim = await _agree(claim, third)
            with_other = await _agree(_answering(claim.question, other), third)
            if with_other and not with_claim:
                return (_liar(claim, (*other, *third), _answering(claim.question, other)),)
            if with_claim and not with_other:
                found = await self._liar_among(other, claim, third)
                if found is not None:
                    return (found,)
        return _dispute(claim, other)

    async def _contradicts_itself(self, claim: Claim) -> Finding | None:
        """Ask a server its question once more."""
        try:
            again = await self._ask(claim.hop, claim)
        except PeerError:
            return None
        if await _agree(claim, (again,)):
            return None
        return _liar(claim, (again,), again, witness="itself")

    async def _liar_among(self, odd: Opinion, claim: Claim, third: Opinion) -> Finding | None:
        """Which server of an opinion is wrong that differs from two others: the only one, or the one whose part the
        claim's server, which holds all of these blocks, answers otherwise."""
        if len(odd) == 1:
            return _liar(odd[0], (claim, *third), claim)
        for part in odd:
            try:
                held_against = await self._ask(Hop(claim.hop.server, part.hop.first, part.hop.last), part)
            except PeerError:
                return None
            if not await _agree(part, (held_against,)):
                return _liar(part, (held_against, *third), held_against)
        return None

    # -- asking

    async def _opinion(self, claim: Claim, without: set[str], unable: set[str]) -> Opinion | None:
        """The claim's blocks on the claim's question, computed by other servers; None when there are none left.

        unable: servers that failed; filled here.
        """
        while (route := self._others(claim.hop, without | unable)) is not None:
            question, parts = claim.question, []
            for hop in route:
                try:
                    parts.append(await self._ask(hop, _blocks_of(claim, hop, question)))
                except PeerError:  # no mark in the peer book: whoever is too slow for a check may do for the work
                    unable.add(hop.server.peer_id)
                    break
                question = parts[-1].answer
            else:
                return tuple(parts)
        return None

    def _others(self, hop: Hop, without: Iterable[str]) -> Sequence[Hop] | None:
        """Other servers of these blocks: few, of the same kind where there are, and not always the same."""
        excluded = set(without)
        record = hop.server.record
        servers = [
            server
            for server in self._directory.snapshot.servers.values()
            if server.peer_id not in excluded and self._peers.is_usable(server.peer_id)
        ]
        draws = {server.peer_id: self._draws.random() for server in servers}

        def cost(server: SpanServer, blocks: int) -> float:
            alike = (server.record.torch_dtype, server.record.quant_type) == (record.torch_dtype, record.quant_type)
            return (1 if alike else 100) + draws[server.peer_id] / 100

        return plan_route(servers, hop.first, hop.last, cost)

    async def _ask(self, hop: Hop, claim: Claim) -> Claim:
        """The claim's question to the hop's blocks, in calls as large as its server takes. Raises PeerError."""
        timeout = min(self._settings.request_timeout, _PATIENCE + 10 * claim.seconds)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._call(hop, claim)
        except PeerDistrustedError as error:
            self._on_distrusted(hop, error)
            raise
        except TimeoutError as error:
            raise PeerTimeoutError(f"no answer to a check within {timeout:g} s") from error
        return Claim(hop, claim.question, claim.prompts, answer, claim.step, claim.seconds)

    async def _call(self, hop: Hop, claim: Claim) -> torch.Tensor:
        rows, seq = claim.question.shape[:2]
        peer_id = hop.server.peer_id
        while True:
            known = self.limits.per_call(peer_id)
            limit = known or USUAL_MAX_TOKENS
            in_steps = claim.step is not None or (known is not None and seq > known)
            size = max(1, limit // seq)
            parts = [slice(start, start + size) for start in range(0, rows, size)]
            # In steps it would compute something else, and pass for wrong.
            if in_steps and (too_large := self.limits.session_too_large(peer_id, 1, seq)) is not None:
                raise PeerRefusedError(str(too_large))
            try:
                if in_steps:
                    answers = [
                        await self._calls.forward_in_steps(
                            hop, claim.question[part], _rows_of(claim.prompts, part), min(claim.step or limit, limit)
                        )
                        for part in parts
                    ]
                else:
                    calls = [
                        self._calls.forward(hop, claim.question[part], _rows_of(claim.prompts, part)) for part in parts
                    ]
                    answers = await together(calls)
                return torch.cat([answer.hidden for answer in answers])
            except PeerRefusedError as error:
                if not self.limits.learn_per_call(peer_id, error, limit if in_steps else size * seq):
                    raise

    # -- blocks at home

    def _home_part(self, hop: Hop) -> tuple[int, int] | None:
        if self.home is None:
            return None
        first, last = max(hop.first, self.home.first), min(hop.last, self.home.last)
        return (first, last) if first < last else None

    async def _part_of(self, claim: Claim, first: int, last: int) -> Claim:
        """The same server on some of the claim's blocks, on hidden states of its own where these do not begin it."""
        question = claim.question
        if claim.hop.first < first:
            before = Hop(claim.hop.server, claim.hop.first, first)
            question = (await self._ask(before, _blocks_of(claim, before, question))).answer
        hop = Hop(claim.hop.server, first, last)
        return await self._ask(hop, _blocks_of(claim, hop, question))

    async def _check_at_home(self, claim: Claim, first: int, last: int) -> tuple[Finding, ...] | None:
        """Hold the claim against blocks at home, which are believed. Where home has a part of its blocks only, its
        server is asked for that part: what went into it in the middle of the claim nobody else knows."""
        if (first, last) != (claim.hop.first, claim.hop.last):
            try:
                claim = await self._part_of(claim, first, last)
            except PeerError:
                return None
        home = self.home
        if home is None:
            return None
        async with self._at_home:  # one at a time: they share this machine's processor with the work
            own = await asyncio.to_thread(home.forward, claim.question, claim.prompts, first=first, last=last)
        kinds = (claim.kind, Kind.of(own.dtype, None))
        found = await asyncio.to_thread(excess, claim.question, claim.answer, own, kinds)
        if found <= 1:
            return ()
        apart = relative_difference(claim.question, claim.answer, own)
        return (Finding("liar", claim.hop.server, first, last, apart, found, (), "home"),)


def _blocks_of(claim: Claim, hop: Hop, question: torch.Tensor) -> Claim:
    """The claim, not answered yet, about some of its blocks and another question."""
    start = hop.first - claim.hop.first
    prompts = None if claim.prompts is None else claim.prompts[start : start + hop.last - hop.first]
    return Claim(hop, question, prompts, question, claim.step, claim.seconds)


async def _agree(claim: Claim, opinion: Opinion) -> bool:
    """In a thread: for a large model that is a second's work, and the loop has others to serve."""
    return await asyncio.to_thread(_excess, claim.question, claim, opinion) <= 1


def _answering(question: torch.Tensor, opinion: Opinion) -> Claim:
    """Servers in a row as one that answers the first one's question; of the coarsest kind among them."""
    coarsest = max(opinion, key=lambda part: allowed(part.kind, part.kind))
    last = opinion[-1]
    return Claim(coarsest.hop, question, None, last.answer.to(coarsest.answer.dtype), last.step, last.seconds)


def _excess(question: torch.Tensor, claim: Claim, opinion: Opinion) -> float:
    """Against the coarsest kind that took part in the opinion."""
    return min(excess(question, claim.answer, opinion[-1].answer, (claim.kind, part.kind)) for part in opinion)


def _servers(opinion: Opinion) -> set[str]:
    return {part.peer_id for part in opinion}


def _liar(
    claim: Claim, others: Opinion, right: Claim, witness: Literal["others", "home", "itself"] = "others"
) -> Finding:
    apart = relative_difference(claim.question, claim.answer, right.answer)
    found = _excess(claim.question, claim, (right,))
    names = tuple(sorted(_servers(others) - {claim.peer_id}))
    return Finding("liar", claim.hop.server, claim.hop.first, claim.hop.last, apart, found, names, witness)


def _dispute(claim: Claim, other: Opinion) -> tuple[Finding, ...]:
    """Everybody who may be the one that is wrong."""
    apart = relative_difference(claim.question, claim.answer, other[-1].answer)
    found = _excess(claim.question, claim, other)
    names = {claim.peer_id, *_servers(other)}
    return tuple(
        Finding(
            "disputed",
            each.hop.server,
            claim.hop.first,
            claim.hop.last,
            apart,
            found,
            tuple(sorted(names - {each.peer_id})),
        )
        for each in (claim, *other)
    )


def _rows_of(prompts: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]
