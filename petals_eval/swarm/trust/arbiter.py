"""The arbiter computes a call again elsewhere, and where the answers differ finds out who is wrong."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from petals_eval.errors import PeerError, PeerTimeoutError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import Hop, hold_all, plan_route
from petals_eval.swarm.peers.finding import TrustFinding, Witness
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.trust.tolerance import Kind, allowed, excess, relative_difference
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Arbiter", "ArbiterPolicy", "BlocksAtHome", "RunHop"]


@dataclass(frozen=True)
class ArbiterPolicy:
    """How long an audit goes on.

    max_thirds: others asked, one after the other, until two of them agree.
    patience: seconds that a call of an audit may take besides ten times what the call took that is audited: nobody
        waits for an audit but the end of a run, and a server that hangs must not hold that up for as long as a call of
        the run may take.
    longest_wait: seconds that an audit waits for servers that are left alone after a failure, where nobody else is.
    """

    max_thirds: int = 4
    patience: float = 20.0
    longest_wait: float = 5.0


class BlocksAtHome(Protocol):
    """Blocks start:stop in this process."""

    start: int
    stop: int

    def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None, *, start: int, stop: int) -> torch.Tensor:
        """Run hidden states (rows, positions, hidden size) through blocks start:stop. It may take long: it is called in
        a thread."""
        ...


RunHop = Callable[[Hop, Activations, int | None], Awaitable[Answer]]
"""Runs activations through a hop's blocks, in steps of so many positions or in one call, and accepts the answer
(`acceptance.Acceptance.run`). Raises PeerError."""
ReplicaAnswer = tuple[RecordedCall, ...]
"""The same blocks as some call's, on one server or on several in a row."""


class Arbiter:
    """Its calls are made like those of the work itself: a server cannot tell them apart.

    home: blocks at home, which are believed; None: there are none.
    """

    def __init__(self, run: RunHop, directory: Directory, peers: PeerBook):
        self._run = run
        self._directory = directory
        self._peers = peers
        self._settings, self._runtime = peers.settings, peers.runtime
        self._at_home = asyncio.Lock()
        self.home: BlocksAtHome | None = None

    def can_check(self, hop: Hop) -> bool:
        """Return whether anybody else holds these blocks, now or in a moment, or home some of them."""
        others = self._home_part(hop) or self._others(hop, {hop.peer_id}) or self.until_others(hop)
        return others is not None

    def until_others(self, hop: Hop) -> float | None:
        """Return the seconds until others may be asked who hold these blocks; None: nobody before long."""
        until = self._runtime.monotonic() + ArbiterPolicy.longest_wait
        servers = [
            server
            for server in self._directory.snapshot.servers.values()
            if server.peer_id != hop.peer_id
            and not (peer := self._peers.of(server.peer_id)).is_quarantined
            and peer.blocked_until <= until
        ]
        if not hold_all(servers, hop.span):
            return None
        waits = (self._peers.of(server.peer_id).blocked_until for server in servers if hop.span.overlaps(server.span))
        wait = max(0.0, *waits) - self._runtime.monotonic()
        return wait if wait > 0 else None

    async def check(self, call: RecordedCall) -> tuple[TrustFinding, ...] | None:
        """Return what came of computing the call again; nothing found means that they agree, None that nobody could."""
        part = self._home_part(call.hop)
        at_home = None if part is None else await self._check_at_home(call, part)
        if at_home or (at_home is not None and part == call.hop.span):
            return at_home
        unable: set[str] = set()
        replica = await self._ask_replica(call, {call.hop.peer_id}, unable)
        if replica is None:
            return at_home
        if await self._agree(call, replica):
            return ()
        return await self._resolve(call, replica, unable)

    # -- who is wrong

    async def _resolve(self, call: RecordedCall, other: ReplicaAnswer, unable: set[str]) -> tuple[TrustFinding, ...]:
        """The call and a replica differ. An honest server repeats itself; a third one sides with the right one."""
        wrong = [found for each in (call, *other) if (found := await self._contradicts_itself(each)) is not None]
        if wrong:
            return tuple(wrong)
        asked = {call.hop.peer_id, *_servers(other)}
        for _ in range(ArbiterPolicy.max_thirds):
            third = await self._ask_replica(call, asked, unable)
            if third is None:
                break
            asked |= _servers(third)
            with_call = await self._agree(call, third)
            with_other = await self._agree(_as_one(call, other), third)
            if with_other and not with_call:
                return (_wrong(call, (*other, *third), _as_one(call, other)),)
            if with_call and not with_other:
                found = await self._wrong_among(other, call, third)
                if found is not None:
                    return (found,)
        return _dispute(call, other)

    async def _contradicts_itself(self, call: RecordedCall) -> TrustFinding | None:
        """Ask a server its question once more."""
        try:
            again = await self._ask(call)
        except PeerError:
            return None
        if await self._agree(call, (again,)):
            return None
        return _wrong(call, (again,), again, witness="itself")

    async def _wrong_among(self, odd: ReplicaAnswer, call: RecordedCall, third: ReplicaAnswer) -> TrustFinding | None:
        """Return which server of an answer is wrong that differs from two others: the only one, or the one whose part
        the call's server, which holds all of these blocks, answers otherwise."""
        if len(odd) == 1:
            return _wrong(odd[0], (call, *third), call)
        for part in odd:
            try:
                held_against = await self._ask(replace(part, hop=Hop(call.hop.server, part.hop.span)))
            except PeerError:
                return None
            if not await self._agree(part, (held_against,)):
                return _wrong(part, (held_against, *third), held_against)
        return None

    # -- asking

    async def _ask_replica(self, call: RecordedCall, without: set[str], unable: set[str]) -> ReplicaAnswer | None:
        """Return the call's blocks computed by other servers; None when there are none left.

        unable: servers that failed; filled here.
        """
        while (route := self._others(call.hop, without | unable)) is not None:
            activations, parts = call.activations, []
            for hop in route:
                try:
                    parts.append(await self._ask(_question(call, hop, activations)))
                except PeerError:  # no mark in the peer book: whoever is too slow for a check may do for the work
                    unable.add(hop.peer_id)
                    break
                activations = activations.after(parts[-1].answer, hop.span.stop)
            else:
                return tuple(parts)
        return None

    def _others(self, hop: Hop, without: Iterable[str]) -> Sequence[Hop] | None:
        """Return other servers of these blocks: few, of the same kind where there are, and not always the same."""
        excluded = set(without)
        record = hop.server.record
        servers = [
            server
            for server in self._directory.snapshot.servers.values()
            if server.peer_id not in excluded and self._peers.of(server.peer_id).is_usable
        ]
        draws = {server.peer_id: self._runtime.random.random() for server in servers}

        def cost(server: SpanServer, blocks: int) -> float:
            kinds = {(each.torch_dtype, each.quant_type or "none") for each in (server.record, record)}
            return (1 if len(kinds) == 1 else 100) + draws[server.peer_id] / 100

        return plan_route(servers, hop.span, cost)

    async def _ask(self, call: RecordedCall) -> RecordedCall:
        """Put the call's question to its server, now. Raises PeerError."""
        timeout = min(self._settings.request_timeout, ArbiterPolicy.patience + 10 * call.seconds)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._run(call.hop, call.activations, call.positions_per_step)
        except TimeoutError as error:
            # What the work asks next need not wait for a question that hangs, such as a probe that this call began.
            self._peers.of(call.hop.peer_id).ask_anew()
            raise PeerTimeoutError(f"no answer to a check within {timeout:g} s") from error
        return replace(call, answer=answer.hidden)

    # -- blocks at home

    def _home_part(self, hop: Hop) -> Span | None:
        return None if self.home is None else hop.span.common(Span(self.home.start, self.home.stop))

    async def _part_of(self, call: RecordedCall, part: Span) -> RecordedCall:
        """Ask the same server some of the call's blocks, on activations of its own where these do not begin it."""
        activations = call.activations
        if call.hop.span.start < part.start:
            before = Hop(call.hop.server, Span(call.hop.span.start, part.start))
            answer = (await self._ask(_question(call, before, activations))).answer
            activations = activations.after(answer, part.start)
        return await self._ask(_question(call, Hop(call.hop.server, part), activations))

    async def _check_at_home(self, call: RecordedCall, part: Span) -> tuple[TrustFinding, ...] | None:
        """Hold the call against blocks at home. Where home has a part of its blocks only, its server is asked for that
        part: what went into it in the middle of the call nobody else knows."""
        if part != call.hop.span:
            try:
                call = await self._part_of(call, part)
            except PeerError:
                return None
        home = self.home
        if home is None:
            return None
        hidden, prompts, answer = call.activations.hidden, call.activations.prompts, call.answer

        def compare() -> tuple[float, float]:
            own = home.forward(hidden, prompts, start=part.start, stop=part.stop)
            times_allowed = excess(hidden, answer, own, (call.kind, Kind.of(own.dtype, None)))
            return times_allowed, relative_difference(hidden, answer, own)

        async with self._at_home:  # one at a time: they share this machine's processor with the work
            times_allowed, apart = await self._runtime.in_thread(compare)
        if times_allowed <= 1:
            return ()
        return (TrustFinding(call.hop.server, "wrong", part, apart, times_allowed, witness="home"),)

    async def _agree(self, call: RecordedCall, replica: ReplicaAnswer) -> bool:
        """In a thread: for a large model that is a second's work, and the loop has others to serve."""
        return await self._runtime.in_thread(_excess, call, replica) <= 1


def _question(call: RecordedCall, hop: Hop, activations: Activations) -> RecordedCall:
    """Return the call, not answered yet, about some of its blocks and what enters them."""
    entering = activations.entering(hop.span.start, hop.span.stop)
    return replace(call, hop=hop, activations=entering, answer=entering.hidden)


def _as_one(call: RecordedCall, replica: ReplicaAnswer) -> RecordedCall:
    """Return servers in a row as one that answers the call's question; of the coarsest kind among them."""
    coarsest = max(replica, key=lambda part: allowed(part.kind, part.kind))
    answer = replica[-1].answer.to(coarsest.answer.dtype)
    return replace(coarsest, activations=call.activations, answer=answer)


def _excess(call: RecordedCall, replica: ReplicaAnswer) -> float:
    """Return how far the answers differ, against the coarsest kind that took part in the replica's."""
    question = call.activations.hidden
    return min(excess(question, call.answer, replica[-1].answer, (call.kind, part.kind)) for part in replica)


def _servers(replica: ReplicaAnswer) -> set[str]:
    return {part.hop.peer_id for part in replica}


def _wrong(call: RecordedCall, others: ReplicaAnswer, right: RecordedCall, witness: Witness = "others") -> TrustFinding:
    apart = relative_difference(call.activations.hidden, call.answer, right.answer)
    names = tuple(sorted(_servers(others) - {call.hop.peer_id}))
    return TrustFinding(call.hop.server, "wrong", call.hop.span, apart, _excess(call, (right,)), names, witness)


def _dispute(call: RecordedCall, other: ReplicaAnswer) -> tuple[TrustFinding, ...]:
    """Return everybody who may be the one that is wrong."""
    apart = relative_difference(call.activations.hidden, call.answer, other[-1].answer)
    found = _excess(call, other)
    names = {call.hop.peer_id, *_servers(other)}
    return tuple(
        TrustFinding(
            each.hop.server,
            "disputed",
            call.hop.span,
            apart,
            found,
            tuple(sorted(names - {each.hop.peer_id})),
            is_used=True,
        )
        for each in (call, *other)
    )
