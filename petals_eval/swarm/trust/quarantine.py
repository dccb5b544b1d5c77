"""Servers whose answers cannot be counted on: left out, told of, and used again only where the settings allow it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from petals_eval.errors import MissingBlocksError, PeerDistrustedError
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import Hop, hold_all, next_hop
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.trust.finding_text import stop_text, warning_text
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span, common_spans, spans_text

__all__ = ["Quarantine"]

_log = logging.getLogger(__name__)


class Quarantine:
    """Used from the connection's event loop; `notices` and `findings` from any thread.

    config_dropout: what the model's config at home says of dropout, for the warnings.
    """

    def __init__(self, directory: Directory, peers: PeerBook):
        self._directory = directory
        self._peers = peers
        self._allow_nondeterministic = peers.settings.allow_nondeterministic
        self._notices: list[str] = []
        self._found: list[Peer] = []  # in order
        self.config_dropout: Mapping[str, float] = {}

    @property
    def notices(self) -> tuple[str, ...]:
        """Warnings, in order."""
        return tuple(self._notices)

    def tell(self, notice: str) -> None:
        """Warn of a server that is used all the same, in another way."""
        self._notices.append(notice)

    @property
    def findings(self) -> tuple[TrustFinding, ...]:
        """What is held against servers, in the order in which it was found."""
        return tuple(peer.finding for peer in list(self._found) if peer.finding is not None)

    def add(self, hop: Hop, error: PeerDistrustedError) -> None:
        """Leave the hop's server out for good, for it answered one question in two ways."""
        self.add_finding(TrustFinding(hop.server, "nondeterministic", hop.span, error.difference), error)

    def add_finding(self, finding: TrustFinding, error: PeerDistrustedError) -> None:
        """Leave a server out for good that others, blocks at home, or itself have shown not to be counted on."""
        peer = self._peers.of(finding.server.peer_id)
        if peer.is_quarantined:
            return
        peer.quarantine(error)
        self._note(peer, finding)
        # What was in dispute with a server that is left out now is explained: one of them was wrong, and here it is.
        for other in list(self._found):
            if other.finding is not None and other.finding.status == "disputed" and self._is_moot(other.finding):
                other.finding = None
                self._found.remove(other)
        trusted = self.trusted()
        others = sum(finding.blocks.within(server.span) for server in trusted)
        if finding.status == "wrong" or not self._allow_nondeterministic or hold_all(trusted, finding.blocks):
            self._warn_of(finding, others=others)

    def add_dispute(self, finding: TrustFinding) -> None:
        """Tell of a server that differs from others, and go on using it: nobody can say who is right."""
        peer = self._peers.of(finding.server.peer_id)
        if peer.finding is not None or self._is_moot(finding):
            return  # told already, or cleared: whoever it disagrees with has been caught in the meantime
        is_first = all(self._peers.of(other).finding is None for other in finding.others)
        self._note(peer, finding)
        _log.debug("%s: disputed on blocks %s (difference %.2g)", peer.name, finding.blocks, finding.difference)
        if is_first:  # one warning names them all
            self._warn_of(finding, others=0)

    def _note(self, peer: Peer, finding: TrustFinding) -> None:
        peer.finding = finding
        if peer not in self._found:
            self._found.append(peer)

    def _is_moot(self, dispute: TrustFinding) -> bool:
        """Return whether somebody that it names has been caught. One is enough: two servers in a row that differ from a
        third one are named beside each other, though neither has ever differed from the other."""
        return any(self._peers.of(other).is_quarantined for other in dispute.others)

    def trusted(self) -> list[SpanServer]:
        """Return the servers of the directory that are not quarantined."""
        every = self._directory.snapshot.servers.values()
        return [server for server in every if not self._peers.of(server.peer_id).is_quarantined]

    def fallback_hop(self, servers: Sequence[SpanServer], span: Span) -> Hop | None:
        """Return a hop on a quarantined server, where the settings allow it; None while that one is failing, too.

        Raises MissingBlocksError where they do not: waiting would not help.
        """
        tolerable = [server for server in servers if not self._is_wrong(server)]
        if not self._allow_nondeterministic or not hold_all(tolerable, span):
            raise self._stop(span)
        # Quarantined ones cost more than any route around them, so that they are used for what nobody else holds.
        usable = [server for server in tolerable if not self._peers.of(server.peer_id).is_backing_off]
        hop = next_hop(
            usable, span, lambda server, blocks: 1e6 * blocks * self._peers.of(server.peer_id).is_quarantined
        )
        if hop is not None:
            peer = self._peers.of(hop.peer_id)
            if peer.finding is not None and not peer.finding.is_used:
                peer.finding = replace(peer.finding, is_used=True)
                self._warn_of(peer.finding, others=0)
        return hop

    def _is_wrong(self, server: SpanServer) -> bool:
        finding = self._peers.of(server.peer_id).finding
        return finding is not None and finding.status == "wrong"

    def _stop(self, span: Span) -> MissingBlocksError:
        caught = {peer.peer_id: peer.finding for peer in self._found if peer.is_quarantined and peer.finding}
        held_by_them_alone = common_spans(self._directory.snapshot.missing(without=frozenset(caught)), span)
        named = [each for each in caught.values() if any(map(each.server.span.overlaps, held_by_them_alone))]
        message = stop_text(spans_text(held_by_them_alone), named, self.config_dropout)
        return MissingBlocksError(message, tuple((each.start, each.stop) for each in held_by_them_alone))

    def _warn_of(self, finding: TrustFinding, *, others: int) -> None:
        self._notices.append(warning_text(finding, others, self.config_dropout))
