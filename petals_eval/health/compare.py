"""Do servers compute the same? What a majority of answers to one question says. Pure functions, no I/O.

Two servers are held to the tolerance that runs go by, `trust.tolerance.excess`. On canaries, with the blocks of
stories260K (trained) and of Llama, BLOOM, Qwen3 and Falcon models of random weights, all of them, the first, the last
and the later half, honest servers reach 0.68 of it for float32 in TF32 and not, 0.55 for float32 and bfloat16, and 0.50
for float32 and float16. Noise of 1% of the answer is at 2.2 at least (`scripts/measure_tolerance.py`).
"""

from dataclasses import dataclass

import torch

from petals_eval.swarm.peers.finding import Status, TrustFinding
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.trust.tolerance import Kind, allowed, excess, relative_difference
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Ballot", "Camp", "Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two answers differ: relative to what the blocks did, and in times of what rounding explains."""

    difference: float
    excess: float


def compare(question: torch.Tensor, one: RecordedCall, answer: torch.Tensor, kind: Kind) -> Comparison | None:
    """Return how far a server's answer to a question is from another one; None where rounding explains it.

    answer, kind: the other answer (rows, positions, hidden size), and what it was computed with. Where one of the two
    was asked less (a server with a small limit of tokens), only what both were asked counts: causal blocks compute a
    beginning alike. The tolerance is the one that runs go by (`trust.tolerance`).
    """
    rows, positions = (min(one.answer.shape[dim], answer.shape[dim]) for dim in (0, 1))
    asked, first, second = (each[:rows, :positions] for each in (question, one.answer, answer))
    times_allowed = excess(asked, first, second, (one.kind, kind))
    return None if times_allowed <= 1 else Comparison(relative_difference(asked, first, second), times_allowed)


@dataclass(slots=True)
class Camp:
    """Servers that agree; the answer of the most precise of them speaks for all."""

    speaker: RecordedCall
    servers: list[SpanServer]


class Ballot:
    """The answers to one question about a span, in camps of those that agree. Holds one answer for each camp.

    question: (rows, positions, hidden size).
    """

    def __init__(self, question: torch.Tensor, span: Span):
        self.question = question
        self.span = span
        self.camps: list[Camp] = []
        self._furthest = Comparison(0.0, 0.0)

    def add(self, answer: RecordedCall) -> None:
        """Put a server's answer to those that it agrees with."""
        for camp in self.camps:
            apart = compare(self.question, camp.speaker, answer.answer, answer.kind)
            if apart is None:
                camp.servers.append(answer.hop.server)
                camp.speaker = min(camp.speaker, answer, key=lambda each: allowed(each.kind, each.kind))
                return
            self._furthest = max(self._furthest, apart, key=lambda each: each.difference)
        self.camps.append(Camp(answer, [answer.hop.server]))

    @property
    def voters(self) -> tuple[SpanServer, ...]:
        """The servers that answered."""
        return tuple(server for camp in self.camps for server in camp.servers)

    def findings(self) -> tuple[TrustFinding, ...]:
        """Return what the answers say of servers.

        Those that more than half of all contradict are wrong. Where there is no such majority, everybody is disputed.
        """
        if len(self.camps) < 2:
            return ()
        voters = self.voters
        largest = max(self.camps, key=lambda camp: len(camp.servers))
        names = tuple(server.peer_id for server in largest.servers)
        if len(names) * 2 > len(voters):
            odd = (server for camp in self.camps if camp is not largest for server in camp.servers)
            return tuple(self._finding(server, "wrong", names) for server in odd)
        names = tuple(server.peer_id for server in voters)
        return tuple(
            self._finding(each, "disputed", tuple(name for name in names if name != each.peer_id)) for each in voters
        )

    def _finding(self, server: SpanServer, status: Status, others: tuple[str, ...]) -> TrustFinding:
        apart = self._furthest
        is_used = status == "disputed"
        return TrustFinding(server, status, self.span, apart.difference, apart.excess, others, is_used=is_used)
