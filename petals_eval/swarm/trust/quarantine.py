"""Servers whose answers cannot be counted on: left out, told of, and used again only where the settings allow it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from petals_eval.errors import MissingBlocksError, PeerDistrustedError
from petals_eval.swarm.directory.coverage import spans_text, within
from petals_eval.swarm.directory.dht import Directory
from petals_eval.swarm.directory.routing import Hop, hold_all, next_hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.trust.unequal import UnequalServer, stop_text, warning_text
from petals_eval.swarm.wire.records import SpanServer

__all__ = ["Distrust"]


class Distrust:
    """What one connection found out of such servers. Used from its event loop; `notices` and `unequal` from any thread.

    config_dropout: what the model's config at home says, for the warnings.
    """

    def __init__(self, directory: Directory, peers: PeerBook, *, allow_nondeterministic: bool):
        self._directory = directory
        self._peers = peers
        self._allow_nondeterministic = allow_nondeterministic
        self._notices: list[str] = []
        self._unequal: dict[str, UnequalServer] = {}
        self.config_dropout: Mapping[str, float] = {}

    @property
    def notices(self) -> tuple[str, ...]:
        """Warnings, in order."""
        return tuple(self._notices)

    @property
    def unequal(self) -> tuple[UnequalServer, ...]:
        """Servers that were told of."""
        return tuple(self._unequal.values())

    def leave_out(self, hop: Hop, error: PeerDistrustedError) -> None:
        """Leave the hop's server out for good, and tell of it."""
        if not self._peers.is_left_out(hop.server.peer_id):
            self._peers.leave_out(hop.server.peer_id, error)
            self.note(UnequalServer(hop.server, error.difference, blocks=(hop.first, hop.last)))

    def note(self, unequal: UnequalServer) -> None:
        """Tell of a server whose answers cannot be counted on; whoever found out has left it out where it is to be."""
        peer_id = unequal.server.peer_id
        known = self._unequal.get(peer_id)
        if unequal.verdict == "disputed" and (known is not None or all(map(self._peers.is_left_out, unequal.others))):
            return  # told already, or cleared: whoever it disagrees with has been caught in the meantime
        self._unequal[peer_id] = unequal
        if unequal.verdict == "disputed":
            if not any(other in self._unequal for other in unequal.others):  # one warning names them all
                self._warn_of(unequal, others=0)
            return
        # Whoever was in dispute with nobody but servers that are left out now is cleared.
        for other in [each for each in self._unequal.values() if each.verdict == "disputed"]:
            if all(map(self._peers.is_left_out, other.others)):
                del self._unequal[other.server.peer_id]
        first, last = unequal.blocks or (unequal.server.start, unequal.server.end)
        trusted = self.trusted()
        others = [server for server in trusted if server.start <= first and last <= server.end]
        if unequal.verdict == "liar" or not self._allow_nondeterministic or hold_all(trusted, first, last):
            self._warn_of(unequal, others=len(others))

    def trusted(self) -> list[SpanServer]:
        """The servers of the directory that were not left out."""
        every = self._directory.snapshot.servers.values()
        return [server for server in every if not self._peers.is_left_out(server.peer_id)]

    def last_resort(self, servers: Sequence[SpanServer], position: int, last: int) -> Hop | None:
        """A hop on a server that was left out, where the settings allow it; None while that one is failing, too.

        Raises MissingBlocksError where they do not: waiting would not help.
        """
        left_out = frozenset(peer_id for peer_id in self._unequal if self._peers.is_left_out(peer_id))
        liars = {peer_id for peer_id, each in self._unequal.items() if each.verdict == "liar"}
        tolerable = [server for server in servers if server.peer_id not in liars]
        if not self._allow_nondeterministic or not hold_all(tolerable, position, last):
            held_by_them_alone = within(self._directory.snapshot.missing(without=left_out), position, last)
            caught = [
                each
                for peer_id, each in self._unequal.items()
                if peer_id in left_out
                and any(each.server.start < end and start < each.server.end for start, end in held_by_them_alone)
            ]
            message = stop_text(spans_text(held_by_them_alone), caught, self.config_dropout)
            raise MissingBlocksError(message, held_by_them_alone)
        # Those left out cost more than any route around them, so that they are used for what nobody else holds.
        usable = [server for server in tolerable if self._peers.is_usable(server.peer_id, even_left_out=True)]
        hop = next_hop(usable, position, last, lambda server, blocks: 1e6 * blocks * (server.peer_id in left_out))
        known = None if hop is None else self._unequal.get(hop.server.peer_id)
        if known is not None and not known.is_used:
            self._unequal[known.server.peer_id] = replace(known, is_used=True)
            self._warn_of(self._unequal[known.server.peer_id], others=0)
        return hop

    def _warn_of(self, unequal: UnequalServer, *, others: int) -> None:
        self._notices.append(warning_text(unequal, others, self.config_dropout))
