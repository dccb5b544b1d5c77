"""Inference sessions along a route: step by step over the servers' key-value caches, and on where a server fails.

What entered the first block of each hop is kept while the session is open. So a hop can be computed anew from there, on
another server or on the same one, whenever its cache is lost or cannot be rolled back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
from anyio import CancelScope

from petals_eval.errors import CallerError, PeerCacheFullError, PeerError, PeerRefusedError, RequestTooLargeError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook, short_peer
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.opening import all_or_none

__all__ = ["RouteSession"]

MOST_HELD = 5.0
"""Seconds for which the other servers' caches are held while a hop that is replaced in mid-session waits for room."""

FindHop = Callable[[int, int, int, float], Awaitable[Hop]]
"""(first, last, tokens, time to give up) -> the next hop; raises SwarmError or RequestTooLargeError."""


@dataclass(eq=False)
class _Leg:
    """One hop of the route, with its stream once there is one.

    reorder: hypo_ids that its server's cache has not seen yet.
    """

    hop: Hop
    stream: HopSession | None = None
    reorder: torch.Tensor | None = None

    async def close(self) -> None:
        stream, self.stream, self.reorder = self.stream, None, None
        if stream is not None:
            await stream.close()


class RouteSession:
    """The async core of `InferenceSession`. Used from the connection's event loop only; opens with the first step."""

    def __init__(
        self,
        calls: BlockCalls,
        find_hop: FindHop,
        failed: Callable[[Hop, PeerError], None],
        peers: PeerBook,
        limits: TokenLimits,
        *,
        first: int,
        last: int,
        batch: int,
        max_length: int,
        deadline: float,
    ):
        """
        failed: told of each hop that could not be computed. deadline: seconds a step may wait for a server of a hop.
        """
        self.first, self.last = first, last
        self.batch, self.max_length = batch, max_length
        self._calls = calls
        self._find_hop = find_hop
        self._failed = failed
        self._peers = peers
        self._limits = limits
        self._deadline = deadline
        self._position = 0
        self._prompts: torch.Tensor | None = None
        self._legs: list[_Leg] = []
        self._inputs: dict[int, _Inputs] = {}  # by the block they enter
        self._stepping = asyncio.Lock()

    @property
    def position(self) -> int:
        """Positions computed so far."""
        return self._position

    @property
    def peer_ids(self) -> tuple[str, ...]:
        """The servers of the route, in order, as far as it is known."""
        return tuple(leg.hop.server.peer_id for leg in self._legs)

    def roll_back(self, position: int) -> None:
        """Forget all but the first `position` positions. Raises CallerError for more than there are."""
        if not 0 <= position <= self._position:
            raise CallerError(f"expected a position within 0:{self._position}, what was computed, found {position}")
        self._position = position

    async def step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run hidden (batch, seq, hidden) after the positions so far; returns the last server's answer.

        prompts: (blocks, batch or 1, prefix, hidden), at position 0 only; added to the session's first `prefix`
            positions, whichever steps they come in.
        hypo_ids: int64 (batch,): row i goes on from what row hypo_ids[i] was.
        Raises CallerError, RequestTooLargeError, and SwarmError when a hop finds no server within the deadline; the
        session is then where it was before the step.
        """
        async with self._stepping:
            self._check(hidden, prompts, hypo_ids)
            before = self._prompts, dict(self._inputs)
            if self._position == 0:
                self._prompts = prompts
            for inputs in self._inputs.values():
                inputs.truncate(self._position)
            try:
                if hypo_ids is not None and self._position:
                    self._reorder(hypo_ids)
                answer = await self._pass_through(hidden)
            except BaseException:
                await self._end_streams()
                self._prompts, self._inputs = before
                raise
            self._position += hidden.shape[1]
            self._inputs = {leg.hop.first: self._inputs[leg.hop.first] for leg in self._legs}
            return answer

    async def close(self) -> None:
        """End every stream, so that the servers free their caches. Safe to call twice."""
        async with self._stepping:
            await self._end_streams()
            self._inputs.clear()

    async def _end_streams(self) -> None:
        legs, self._legs = self._legs, []
        with CancelScope(shield=True):
            async with asyncio.TaskGroup() as group:
                for leg in legs:
                    group.create_task(leg.close())

    async def _pass_through(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the first block to the last, hop by hop, on to another server where one fails."""
        end = self._position + hidden.shape[1]
        states, start = hidden, self._position  # what enters the block, from which position on
        block, index = self.first, 0
        if not self._legs:
            await self._open_route(end)
        give_up = time.monotonic() + self._deadline
        waits_since: float | None = None
        while block < self.last:
            leg = await self._leg(index, block, end, give_up)
            if block not in self._inputs:
                self._inputs[block] = _Inputs(self.batch, self.max_length, states)
            self._inputs[block].put(states, start)
            # The next hop may need more than this step: a server that has come in for another knows nothing yet.
            known = self._inputs.get(leg.hop.last)
            since = self._position if leg.hop.last == self.last else min(self._position, known.length if known else 0)
            try:
                states = await self._run(leg, since, end)
            except PeerError as error:
                await self._leave(leg, error)
                if isinstance(error, PeerCacheFullError):
                    waits_since = waits_since or time.monotonic()
                    if time.monotonic() - waits_since > MOST_HELD:
                        await self._let_caches_go()
                continue
            start, block, index = since, leg.hop.last, index + 1
            give_up, waits_since = time.monotonic() + self._deadline, None
        return states[:, self._position - start :]

    async def _open_route(self, end: int) -> None:
        """Reserve the caches of a whole route, or none: what is held while another is waited for, nobody else can use.

        Two that each hold what the other waits for would do so until their deadlines.
        """
        give_up = time.monotonic() + self._deadline
        while not self._legs:
            hops: list[Hop] = []
            while not hops or hops[-1].last < self.last:
                block = hops[-1].last if hops else self.first
                hops.append(await self._find_hop(block, self.last, self.batch * end, give_up))
            openings = [self._calls.session(hop, self.batch, self.max_length) for hop in hops]
            legs = []
            for hop, opened in zip(hops, await all_or_none(openings), strict=True):
                if isinstance(opened, PeerError):
                    self._failed(hop, opened)
                else:
                    legs.append(_Leg(hop, opened))
            if len(legs) == len(hops):
                self._legs = legs

    async def _let_caches_go(self) -> None:
        """Close every stream. What they held is computed anew from what entered each hop, when it is needed."""
        for leg in self._legs:
            await leg.close()

    async def _leg(self, index: int, block: int, end: int, give_up: float) -> _Leg:
        """The hop that begins at this block: the session's own, or a new one that ends where the next one begins."""
        if index < len(self._legs) and self._legs[index].hop.first == block:
            return self._legs[index]
        last = self._legs[index].hop.first if index < len(self._legs) else self.last
        self._legs.insert(index, _Leg(await self._find_hop(block, last, self.batch * end, give_up)))
        return self._legs[index]

    async def _leave(self, leg: _Leg, error: PeerError) -> None:
        """Give up a stream that failed, and its server as well unless it only said how much it takes at once."""
        peer_id = leg.hop.server.peer_id
        step = self._positions_per_step(peer_id) * self.batch
        await leg.close()
        if isinstance(error, PeerRefusedError) and self._limits.learn_per_call(peer_id, error, step):
            return
        self._legs.remove(leg)
        self._failed(leg.hop, error)

    async def _run(self, leg: _Leg, since: int, end: int) -> torch.Tensor:
        """Compute a hop up to position `end` from what was kept; returns its answers from position `since` on."""
        hop, inputs = leg.hop, self._inputs[leg.hop.first]
        stream = await self._stream_at(leg, since)
        step = self._positions_per_step(hop.server.peer_id)
        answers: list[torch.Tensor] = []
        while not answers or stream.position < end:
            start = stream.position
            part = slice(start, min(start + step, end))
            prompts = None
            if self._prompts is not None:
                prompts = self._prompts[hop.first - self.first : hop.last - self.first, :, part]
            reorder, leg.reorder = leg.reorder, None
            answer = await stream.step(inputs.part(part), prompts, reorder)
            self._peers.succeeded(
                hop.server.peer_id,
                tokens=self.batch * (part.stop - part.start),
                sent=answer.bytes_sent,
                received=answer.bytes_received,
            )
            if part.stop > since or part.start == end:
                answers.append(answer.hidden[:, max(0, since - start) :])
        return answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)

    async def _stream_at(self, leg: _Leg, position: int) -> HopSession:
        """The hop's stream with no more than `position` positions in its cache."""
        stream = leg.stream
        if stream is not None and stream.position > position:
            if await self._calls.rolls_back(leg.hop, self._inputs[leg.hop.first].hidden_size):
                stream.roll_back(position)
            else:
                await leg.close()
                stream = None
        if stream is None:
            leg.stream = stream = await self._calls.session(leg.hop, self.batch, self.max_length)
            leg.reorder = None  # what was kept is in the new order already
        return stream

    def _positions_per_step(self, peer_id: str) -> int:
        limit = self._limits.per_call(peer_id) or USUAL_MAX_TOKENS
        if limit < self.batch:
            raise RequestTooLargeError(
                f"a step holds at least one token of each of the session's {self.batch} rows, but server "
                f"{short_peer(peer_id)} takes {limit} in one call: open the session with a smaller batch"
            )
        return limit // self.batch

    def _reorder(self, hypo_ids: torch.Tensor) -> None:
        self._inputs = {block: inputs.reordered(hypo_ids) for block, inputs in self._inputs.items()}
        if self._prompts is not None and self._prompts.shape[1] != 1:
            self._prompts = self._prompts[:, hypo_ids]
        for leg in self._legs:
            if leg.stream is not None:
                leg.reorder = hypo_ids

    def _check(self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None) -> None:
        if hidden.ndim != 3 or hidden.shape[0] != self.batch or not hidden.is_floating_point():
            raise CallerError(
                f"expected hidden states ({self.batch}, seq, hidden) of a float dtype, found {tuple(hidden.shape)} "
                f"{hidden.dtype}"
            )
        end = self._position + hidden.shape[1]
        if end > self.max_length:
            raise RequestTooLargeError(
                f"expected at most {self.max_length} positions, the session's max_length, found {end}: open it with a "
                "larger one"
            )
        kept = self._inputs.get(self.first)
        if kept is not None and self._position and kept.hidden_size != hidden.shape[2]:
            raise CallerError(f"expected hidden states {kept.hidden_size} wide, as before, found {hidden.shape[2]}")
        if prompts is not None:
            if self._position:
                raise CallerError(
                    "deep prompts belong to the session's first positions: expected them at position 0, "
                    f"found them at {self._position}"
                )
            blocks = self.last - self.first
            if (
                prompts.ndim != 4
                or (prompts.shape[0], prompts.shape[3]) != (blocks, hidden.shape[2])
                or (prompts.shape[1] not in (1, self.batch))
            ):
                raise CallerError(
                    f"expected deep prompts ({blocks}, 1 or {self.batch}, prefix, {hidden.shape[2]}), found "
                    f"{tuple(prompts.shape)}"
                )
        if hypo_ids is not None and (
            hypo_ids.dtype is not torch.int64
            or hypo_ids.shape != (self.batch,)
            or not all(0 <= row < self.batch for row in hypo_ids.tolist())
        ):
            raise CallerError(f"expected hypo_ids int64 ({self.batch},) of rows 0:{self.batch}, found {hypo_ids}")


class _Inputs:
    """What entered a block: (batch, length, hidden), in the widest dtype that came.

    Room for all of the session is reserved at once, and taken by the system only as it is written to.
    """

    def __init__(self, batch: int, max_length: int, like: torch.Tensor):
        self.length = 0
        self.hidden_size = like.shape[2]
        self._states = torch.empty(batch, max_length, self.hidden_size, dtype=like.dtype)

    def put(self, states: torch.Tensor, start: int) -> None:
        """Keep states (batch, seq, hidden) as the positions from `start` on; what was there is forgotten."""
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
