"""Inference sessions along a route: step by step over the servers' key-value caches, and on where a server fails.

What entered the first block of each hop is kept while the session is open. So a hop can be computed anew from there, on
another server or on the same one, whenever its cache is lost or cannot be rolled back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from anyio import CancelScope

from petals_eval.errors import (
    CallerError,
    PeerCacheFullError,
    PeerError,
    PeerLimitError,
    PeerNotFiniteError,
    RequestTooLargeError,
)
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.opening import all_or_none
from petals_eval.swarm.transport.rolling_back import rolls_back
from petals_eval.swarm.transport.rpc import ServedHop
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.non_finite import raise_if_input_overflows
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.wire.span import Span

__all__ = ["MAX_HELD_SECONDS", "FindHop", "RouteSession"]

_log = logging.getLogger(__name__)

MAX_HELD_SECONDS = 5.0
"""How long the other servers' caches are held while a hop that is replaced in mid-session waits for room."""

FindHop = Callable[[Span, int, float], Awaitable[Hop]]
"""(blocks that are left, tokens, time to give up) -> the next hop; raises SwarmError or RequestTooLargeError."""


@dataclass(eq=False)
class _Leg:
    """One hop of the route, with its session once there is one.

    is_probed: whether the server has shown that it runs in evaluation mode since the session was opened.
    reorder: hypo_ids that its server's cache has not seen yet.
    since: the first position that its answers were used for. dtype: of these. seconds: they took.
    """

    hop: Hop
    session: HopSession | None = None
    is_probed: bool = False
    reorder: torch.Tensor | None = None
    since: int | None = None
    dtype: torch.dtype | None = None
    seconds: float = 0.0

    async def close(self) -> None:
        session, self.session, self.reorder, self.is_probed = self.session, None, None, False
        if session is not None:
            await session.close()


class RouteSession:
    """The async core of `InferenceSession`. Used from the connection's event loop only; opens with the first step."""

    def __init__(
        self,
        client: HopClient,
        acceptance: Acceptance,
        find_hop: FindHop,
        on_failed: Callable[[Hop, PeerError], None],
        holders: Callable[[int], Sequence[str]],
        count_steps: Callable[[int], object],
        peers: PeerBook,
        *,
        span: Span,
        rows: int,
        max_length: int,
    ):
        """
        on_failed: told of each hop that could not be computed. holders: the servers (peer ids) of a block.
        count_steps: told of each step that begins (1) and ends (-1).
        """
        self.span = span
        self.rows, self.max_length = rows, max_length
        self._client = client
        self._acceptance = acceptance
        self._find_hop = find_hop
        self._on_failed = on_failed
        self._holders = holders
        self._count_steps = count_steps
        self._peers = peers
        self._runtime = peers.runtime
        self._deadline = peers.settings.deadline  # seconds a step may wait for a server of a hop
        self._position = 0
        self._prompts: torch.Tensor | None = None
        self._legs: list[_Leg] = []
        self._inputs: dict[int, _Inputs] = {}  # by the block they enter; what leaves the last one is kept like them
        self._stepping = asyncio.Lock()
        self._served: dict[ServedHop, None] = {}
        self._waiting_since: float | None = None

    @property
    def position(self) -> int:
        """How many positions were computed so far."""
        return self._position

    @property
    def peer_ids(self) -> tuple[str, ...]:
        """The servers of the route, in order, as far as it is known."""
        return tuple(leg.hop.peer_id for leg in self._legs)

    @property
    def hops(self) -> tuple[ServedHop, ...]:
        """Who computed any part of it, those that were replaced among them."""
        return tuple(self._served)

    @property
    def seconds_waiting(self) -> float:
        """How long the step under way has been waiting for a server that opens a session; 0 when it is not."""
        since = self._waiting_since
        return 0.0 if since is None else self._runtime.monotonic() - since

    def roll_back(self, position: int) -> None:
        """Forget all but the first `position` positions. Raises CallerError for more than there are."""
        if not 0 <= position <= self._position:
            raise CallerError(f"expected a position within 0:{self._position}, what was computed, found {position}")
        self._position = position

    async def step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run hidden (rows, positions, hidden size) after the positions so far; return the last server's answer.

        prompts: (blocks, rows or 1, prefix, hidden size), at position 0 only; added to the session's first `prefix`
            positions, whichever steps they come in.
        hypo_ids: int64 (rows,): row i goes on from what row hypo_ids[i] was.
        Raises CallerError, RequestTooLargeError, NotFiniteError where it overflows the servers' dtype, and SwarmError
        when a hop finds no server within the deadline; the session is then where it was before the step.
        """
        async with self._stepping:
            self._check(hidden, prompts, hypo_ids)
            before = self._prompts, dict(self._inputs)
            if self._position == 0:
                self._prompts = prompts
            for inputs in self._inputs.values():
                inputs.truncate(self._position)
            self._count_steps(1)
            try:
                if hypo_ids is not None and self._position:
                    self._reorder(hypo_ids)
                answer = await self._pass_through(hidden)
            except BaseException:
                await self._end_sessions()
                self._prompts, self._inputs = before
                raise
            finally:
                self._waiting_since = None
                self._count_steps(-1)
            self._position += hidden.shape[1]
            kept = [*(leg.hop.span.start for leg in self._legs), self.span.stop]
            self._inputs = {block: self._inputs[block] for block in kept}
            return answer

    async def close(self, *, may_audit: bool = False) -> None:
        """End the session on every server, so that they free their caches. Safe to call twice.

        may_audit: let a share of what its servers computed be computed elsewhere, too, as of ordinary calls.
        """
        async with self._stepping:
            calls = list(self.recorded()) if may_audit else []
            await self._end_sessions()
            self._inputs.clear()
        for call in calls:
            with suppress(PeerError):  # caught meanwhile: whoever counts its answers hears of that elsewhere
                await self._acceptance.offer(call)

    def recorded(self) -> Iterator[RecordedCall]:
        """Yield what each server computed from the first position to the last, as one call, until the next step changes
        it. What one that was replaced began is nobody's alone, and is left out."""
        for leg in self._legs:
            inputs, answers = (self._inputs.get(block) for block in (leg.hop.span.start, leg.hop.span.stop))
            if leg.since != 0 or leg.dtype is None or inputs is None or answers is None or not self._position:
                continue
            positions, prompts = slice(0, self._position), self._prompts_of(leg.hop)
            if prompts is not None and prompts.shape[2] > self._position:
                continue
            entered = Activations(inputs.part(positions), prompts, leg.hop.span.start)
            yield RecordedCall(leg.hop, entered, answers.part(positions).to(leg.dtype), seconds=leg.seconds)

    async def _end_sessions(self) -> None:
        legs, self._legs = self._legs, []
        with CancelScope(shield=True):
            async with asyncio.TaskGroup() as group:
                for leg in legs:
                    group.create_task(leg.close())

    async def _pass_through(self, hidden: torch.Tensor) -> torch.Tensor:
        """Go from the first block to the last, hop by hop, on to another server where one fails."""
        end = self._position + hidden.shape[1]
        states, start = hidden, self._position  # what enters the block, from which position on
        block, index = self.span.start, 0
        if not self._legs:
            await self._open_route(end)
        give_up = self._runtime.monotonic() + self._deadline
        waits_since: float | None = None
        non_finite: list[Hop] = []
        while block < self.span.stop:
            leg = await self._leg(index, block, end, give_up)
            self._keep(block, states, start)
            # The next hop may need more than this step: a server that has come in for another knows nothing yet.
            stop = leg.hop.span.stop
            known = self._inputs.get(stop)
            since = self._position if stop == self.span.stop else min(self._position, known.length if known else 0)
            try:
                states = await self._run(leg, since, end)
            except PeerError as error:
                await self._leave(leg, error)
                if isinstance(error, PeerCacheFullError):
                    waits_since = waits_since or self._runtime.monotonic()
                    if self._runtime.monotonic() - waits_since > MAX_HELD_SECONDS:
                        await self._release_caches()
                if isinstance(error, PeerNotFiniteError):
                    non_finite.append(leg.hop)
                    entered = Activations(self._inputs[block].part(slice(0, end)))
                    await raise_if_input_overflows(self._client, non_finite, self._holders(block), entered)
                continue
            start, block, index = since, stop, index + 1
            give_up, waits_since, non_finite = self._runtime.monotonic() + self._deadline, None, []
        states = states[:, self._position - start :]
        self._keep(block, states, self._position)
        return states

    def _keep(self, block: int, states: torch.Tensor, start: int) -> None:
        """Keep what entered a block, from position `start` on."""
        if block not in self._inputs:
            self._inputs[block] = _Inputs(self.rows, self.max_length, states)
        self._inputs[block].put(states, start)

    async def _open_route(self, end: int) -> None:
        """Reserve the caches of a whole route, or none: what is held while another is waited for, nobody else can use.

        Two that each hold what the other waits for would do so until their deadlines.
        """
        self._waiting_since = self._runtime.monotonic()
        give_up = self._waiting_since + self._deadline
        while not self._legs:
            hops: list[Hop] = []
            while not hops or hops[-1].span.stop < self.span.stop:
                block = hops[-1].span.stop if hops else self.span.start
                hops.append(await self._find_hop(Span(block, self.span.stop), self.rows * end, give_up))
            openings = [self._client.open_session(hop, self.rows, self.max_length) for hop in hops]
            legs = []
            for hop, opened in zip(hops, await all_or_none(openings), strict=True):
                if isinstance(opened, PeerError):
                    self._on_failed(hop, opened)
                else:
                    legs.append(_Leg(hop, opened))
            if len(legs) == len(hops):
                self._legs = legs
        self._waiting_since = None

    async def _release_caches(self) -> None:
        """Close every session. What they held is computed anew from what entered each hop, when it is needed."""
        for leg in self._legs:
            await leg.close()

    async def _leg(self, index: int, block: int, end: int, give_up: float) -> _Leg:
        """Return the hop that begins at this block: the session's own, or a new one that stops where the next one
        begins."""
        if index < len(self._legs) and self._legs[index].hop.span.start == block:
            return self._legs[index]
        self._waiting_since = self._waiting_since or self._runtime.monotonic()
        stop = self._legs[index].hop.span.start if index < len(self._legs) else self.span.stop
        self._legs.insert(index, _Leg(await self._find_hop(Span(block, stop), self.rows * end, give_up)))
        return self._legs[index]

    async def _leave(self, leg: _Leg, error: PeerError) -> None:
        """Give up a session that failed, and its server as well unless it only said how much it takes in a step."""
        was_open = leg.session is not None
        name = self._peers.of(leg.hop.peer_id).name
        _log.debug("%s: session on blocks %s ends at position %d: %s", name, leg.hop.span, self._position, error)
        await leg.close()
        if not (was_open and isinstance(error, PeerLimitError)):
            self._legs.remove(leg)
            self._on_failed(leg.hop, error)

    async def _run(self, leg: _Leg, since: int, end: int) -> torch.Tensor:
        """Compute a hop up to position `end` from what was kept; return its answers from position `since` on."""
        hop, inputs = leg.hop, self._inputs[leg.hop.span.start]
        peer = self._peers.of(hop.peer_id)
        session = await self._session_at(leg, since)
        self._waiting_since = None
        leg.since = since if leg.since is None else leg.since
        step = self._positions_per_step(peer)
        answers: list[torch.Tensor] = []
        while not answers or session.position < end:
            start = session.position
            part = slice(start, min(start + step, end))
            prompts = self._prompts_of(hop)
            prompts = None if prompts is None else prompts[:, :, part]
            entering = Activations(inputs.part(part), prompts, hop.span.start)
            if entering.values and not leg.is_probed:
                await self._acceptance.ready(hop, entering)
                leg.is_probed = True
            reorder, leg.reorder = leg.reorder, None
            answer = await self._client.step(session, hop, entering.hidden, prompts, reorder)
            await self._acceptance.accept(RecordedCall(hop, entering, answer.hidden), may_audit=False)
            peer.on_succeeded(
                hop.server.span, tokens=entering.tokens, sent=answer.bytes_sent, received=answer.bytes_received
            )
            self._served[ServedHop.of(hop, answer.hidden)] = None
            leg.dtype, leg.seconds = answer.hidden.dtype, leg.seconds + answer.seconds
            if part.stop > since or part.start == end:
                answers.append(answer.hidden[:, max(0, since - start) :])
        return answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)

    def _prompts_of(self, hop: Hop) -> torch.Tensor | None:
        """Return the prompts of a hop's blocks, (blocks, rows or 1, prefix, hidden size)."""
        if self._prompts is None:
            return None
        return self._prompts[hop.span.start - self.span.start : hop.span.stop - self.span.start]

    async def _session_at(self, leg: _Leg, position: int) -> HopSession:
        """Return the hop's session with no more than `position` positions in its cache."""
        session = leg.session
        if session is not None and session.position > position:
            peer, size = self._peers.of(leg.hop.peer_id), self._inputs[leg.hop.span.start].hidden_size
            if await rolls_back(self._client, peer, leg.hop, size):
                session.roll_back(position)
            else:
                await leg.close()
                session = None
        if session is None:
            leg.session = session = await self._client.open_session(leg.hop, self.rows, self.max_length)
            leg.reorder = None  # what was kept is in the new order already
        return session

    def _positions_per_step(self, peer: Peer) -> int:
        limit = peer.limits.per_call or USUAL_MAX_TOKENS
        if limit < self.rows:
            raise RequestTooLargeError(
                f"a step holds at least one token of each of the session's {self.rows} rows, but server {peer.name} "
                f"takes {limit} in one call: open the session with a smaller batch"
            )
        return limit // self.rows

    def _reorder(self, hypo_ids: torch.Tensor) -> None:
        self._inputs = {block: inputs.reordered(hypo_ids) for block, inputs in self._inputs.items()}
        if self._prompts is not None and self._prompts.shape[1] != 1:
            self._prompts = self._prompts[:, hypo_ids]
        for leg in self._legs:
            if leg.session is not None:
                leg.reorder = hypo_ids

    def _check(self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None) -> None:
        if hidden.ndim != 3 or hidden.shape[0] != self.rows or not hidden.is_floating_point():
            raise CallerError(
                f"expected hidden states ({self.rows}, seq, hidden) of a float dtype, found {tuple(hidden.shape)} "
                f"{hidden.dtype}"
            )
        end = self._position + hidden.shape[1]
        if end > self.max_length:
            raise RequestTooLargeError(
                f"expected at most {self.max_length} positions, the session's max_length, found {end}: open it with a "
                "larger one"
            )
        kept = self._inputs.get(self.span.start)
        if kept is not None and self._position and kept.hidden_size != hidden.shape[2]:
            raise CallerError(f"expected hidden states {kept.hidden_size} wide, as before, found {hidden.shape[2]}")
        if prompts is not None:
            if self._position:
                raise CallerError(
                    "deep prompts belong to the session's first positions: expected them at position 0, "
                    f"found them at {self._position}"
                )
            blocks = len(self.span)
            if (
                prompts.ndim != 4
                or (prompts.shape[0], prompts.shape[3]) != (blocks, hidden.shape[2])
                or (prompts.shape[1] not in (1, self.rows))
            ):
                raise CallerError(
                    f"expected deep prompts ({blocks}, 1 or {self.rows}, prefix, {hidden.shape[2]}), found "
                    f"{tuple(prompts.shape)}"
                )
        if hypo_ids is not None and (
            hypo_ids.dtype is not torch.int64
            or hypo_ids.shape != (self.rows,)
            or not all(0 <= row < self.rows for row in hypo_ids.tolist())
        ):
            raise CallerError(f"expected hypo_ids int64 ({self.rows},) of rows 0:{self.rows}, found {hypo_ids}")


class _Inputs:
    """What entered a block: (rows, length, hidden size), in the widest dtype that came.

    Room for all of the session is reserved at once, and taken by the system only as it is written to.
    """

    def __init__(self, rows: int, max_length: int, like: torch.Tensor):
        self.length = 0
        self.hidden_size = like.shape[2]
        self._states = torch.empty(rows, max_length, self.hidden_size, dtype=like.dtype)

    def put(self, states: torch.Tensor, start: int) -> None:
        """Keep states (rows, positions, hidden size) as the positions from `start` on; what was there is forgotten."""
        dtype = torch.promote_types(self._states.dtype, states.dtype)
        self._states = self._states.to(dtype)
        self.length = start + states.shape[1]
        self._states[:, start : self.length] = states

    def part(self, positions: slice) -> torch.Tensor:
        return self._states[:, positions]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def reordered(self, rows: torch.Tensor) -> "_Inputs":
        """A copy in which row i is what row `rows[i]` was."""
        copy = _Inputs(self._states.shape[0], self._states.shape[1], self._states)
        copy.put(self._states[rows, : self.length], 0)
        return copy
