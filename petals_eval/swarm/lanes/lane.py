"""A lane: a long-lived session along a route whose caches hold a prefix, for one micro-batch after the other."""

import asyncio

import torch

from petals_eval.swarm.lanes.prefix import LaneSize, Prefix, PrefixedRows
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.wire.span import Span

__all__ = ["Lane"]


class Lane:
    """Goes back to the end of what a micro-batch shares with the one before it, and computes the rest alone.

    turn: held by the micro-batch that is under way. users: micro-batches that are under way or wait for their turn.
    path: the prefixes that it holds, or will when those are through. planned: the servers that it is to be opened on.
    nbytes: of hidden states that it keeps here at most.
    opened_at, used_at: on the runtime's clock.
    is_lost: it computes nothing any more.
    """

    def __init__(self, session: RouteSession, size: LaneSize, planned: tuple[str, ...], nbytes: int, now: float):
        self.session = session
        self.planned = planned
        self.nbytes = nbytes
        self.size = size
        self.turn = asyncio.Lock()
        self.users = 0
        self.path: tuple[Prefix, ...] = ()
        self.opened_at = self.used_at = now
        self.is_lost = False
        self._held: tuple[Prefix, ...] = ()

    @property
    def tokens(self) -> int:
        """What it takes of a server's cache in each block."""
        return self.size.rows * self.size.positions

    @property
    def is_open(self) -> bool:
        """Whether its servers have reserved their caches."""
        return bool(self.session.peer_ids)

    @property
    def servers(self) -> tuple[str, ...]:
        """The servers (peer ids) that it goes through, or is to."""
        return self.session.peer_ids or self.planned

    def fits(self, work: PrefixedRows, span: Span) -> bool:
        """Return whether it goes through these blocks, and has rows and positions enough."""
        is_large = work.rows <= self.size.rows and work.end <= self.size.positions
        return is_large and self.session.span == span

    def shared(self, prefix: Prefix) -> int:
        """Return how many positions of a prefix need not be computed again."""
        return sum(each.hidden.shape[1] for each in _common(self.path, prefix.path))

    def kept(self, prefix: Prefix) -> int:
        """Return how many positions of a prefix are in its caches now."""
        return sum(each.hidden.shape[1] for each in _common(self._held, prefix.path))

    async def run(self, work: PrefixedRows) -> tuple[torch.Tensor, bool]:
        """Return what the last server makes of the rows' own positions, and whether the session went back for it.

        Raises what `RouteSession.step` raises. A short micro-batch is filled up with copies of its last row: the caches
        have been reserved for so many.
        """
        path = work.prefix.path
        kept, self._held = _common(self._held, path), ()
        position = sum(each.hidden.shape[1] for each in kept)
        went_back = self.session.position > position
        self.session.roll_back(position)
        parts = [*(each.hidden for each in path[len(kept) :]), work.hidden]
        hidden = torch.cat([_filled(part, self.size.rows) for part in parts], dim=1)
        answer = await self.session.step(hidden, None if position else path[0].prompts)
        self._held = path
        return answer[: work.rows, -work.hidden.shape[1] :], went_back


def _common(held: tuple[Prefix, ...], wanted: tuple[Prefix, ...]) -> tuple[Prefix, ...]:
    """Return the prefixes that both begin with."""
    common = 0
    while common < min(len(held), len(wanted)) and held[common] is wanted[common]:
        common += 1
    return wanted[:common]


def _filled(hidden: torch.Tensor, rows: int) -> torch.Tensor:
    """Return hidden (rows, ...) with its last row once more for each that is missing."""
    missing = rows - hidden.shape[0]
    return torch.cat([hidden, hidden[-1:].expand(missing, -1, -1)]) if missing else hidden
