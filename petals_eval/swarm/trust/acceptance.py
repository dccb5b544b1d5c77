"""What a server passes before it is called, and each answer before it counts: ordinary, pushed, or of a session."""

from functools import partial

from petals_eval.errors import PeerNondeterministicError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.trust.audit import ReplicaAudit
from petals_eval.swarm.trust.determinism_guard import DeterminismGuard
from petals_eval.swarm.trust.recorded_call import RecordedCall

__all__ = ["Acceptance"]


class Acceptance:
    """Used from the connection's event loop only.

    audit: computes a share of the answers again; None: nothing is audited, as what an audit itself asks.
    """

    def __init__(self, client: HopClient, peers: PeerBook, guard: DeterminismGuard, audit: ReplicaAudit | None = None):
        self._client = client
        self._peers = peers
        self._guard = guard
        self._settings = settings = peers.settings
        # On a lossy wire the code's own error would hide what is to be found.
        self._audit = None if settings.verify == 0 or settings.wire is not None else audit

    async def run(self, hop: Hop, activations: Activations, positions_per_step: int | None = None) -> Answer:
        """Run what enters the hop's first block through its blocks, as `HopClient.run`, and accept the answer.

        Raises PeerError.
        """
        peer = self._peers.of(hop.peer_id)
        await self.ready(hop, activations)
        peer.window.mark_started(self._peers.runtime.monotonic())
        answer = await self._client.run(hop, activations, positions_per_step=positions_per_step)
        limit = peer.limits.per_call
        if positions_per_step is None and limit is not None and activations.positions > limit:
            positions_per_step = limit
        await self.accept(RecordedCall(hop, activations, answer.hidden, positions_per_step, answer.seconds))
        return answer

    async def ready(self, hop: Hop, activations: Activations) -> None:
        """Return once the hop's server has shown that it runs in evaluation mode. Raises PeerError.

        Concurrent callers share its first probe, and now and then a call waits until it has been probed again.
        """
        peer = self._peers.of(hop.peer_id)
        self.refuse_distrusted(peer)
        if peer.distrusted is not None or not activations.values:
            return
        state = peer.probes.get(hop.server.span)
        if state is not None and state.tokens < state.due_at:
            for span, probe in state.probes.items():
                if probe.is_answered and span.start <= hop.span.start and hop.span.stop <= span.stop:
                    return
        await self._guard.ensure_probed(peer, hop, activations)

    async def accept(self, call: RecordedCall, *, may_audit: bool = True) -> None:
        """Count an answer, and choose whether to audit it.

        may_audit: whether the answer depends on nothing but what is in the record, as those of a session's steps do.
        Raises PeerDistrustedError where its server was caught while it computed.
        """
        peer = self._peers.of(call.hop.peer_id)
        self.refuse_distrusted(peer)
        tokens, span = call.activations.tokens, call.hop.server.span
        state = peer.probes.get(span) or self._guard.new_state(peer, span)
        state.tokens += tokens
        if may_audit and tokens:
            await self.offer(call)

    async def offer(self, call: RecordedCall, *, is_lent: bool = False) -> None:
        """Choose whether to audit what was accepted (`is_lent`: its tensors will change). Raises PeerError."""
        if self._audit is None:
            return
        self._audit.computed += 1
        peer, span = self._peers.of(call.hop.peer_id), call.hop.server.span
        sampler = peer.samplers.get(span) or self._audit.new_sampler(peer, span)
        if sampler.chooses(
            call.copied() if is_lent and sampler.keeps else call, partial(self._audit.can_check, call.hop)
        ):
            await self._audit.start(peer, call.copied() if is_lent else call)
            self.refuse_distrusted(peer)

    def refuse_distrusted(self, peer: Peer) -> None:
        """Raise what the server was quarantined with, unless it is the last resort that the settings allow."""
        error = peer.distrusted
        if error is not None and not (
            self._settings.allow_nondeterministic and isinstance(error, PeerNondeterministicError)
        ):
            raise error
