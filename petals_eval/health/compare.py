"""Do servers compute the same? What a majority of answers to one question says. Pure functions, no I/O."""

import math
from dataclasses import dataclass

import torch

from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.trust.determinism import difference
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.trust.tolerance import SAME_SERVER
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Ballot", "Camp", "agree"]

_QUANTISED = {"int8": 0.25, "nf4": 0.6}
"""The `difference` that a quantised server may have: a guess on the safe side of the weights' own rounding, which is
0.2 to 0.5% for int8 and 7 to 10% for nf4, each matrix of a block adding to it."""
_OTHER_QUANT = 0.6  # a word nobody knows


def agree(question: torch.Tensor, one: RecordedCall, other: RecordedCall, blocks: int) -> tuple[float, float]:
    """How far two answers to a question are apart, and how far their rounding explains."""
    rows = min(one.answer.shape[0], other.answer.shape[0])
    positions = min(one.answer.shape[1], other.answer.shape[1])
    first, second = (each.answer[:rows, :positions].float() for each in (one, other))
    question = question[:rows, :positions]
    done = float((first - question).norm())
    size = float(first.norm()) / done if done > 0 else 0.0
    epsilon = max(torch.finfo(each.answer.dtype).eps for each in (one, other))
    carried = epsilon / 2 * math.sqrt(2 * blocks) * size
    return difference(question, first, second), max(_allowed(one), _allowed(other)) + carried


def _allowed(answer: RecordedCall) -> float:
    rounding = SAME_SERVER[answer.answer.dtype]
    quant = answer.kind.quant
    return rounding if quant == "none" else max(rounding, _QUANTISED.get(quant, _OTHER_QUANT))


@dataclass(slots=True)
class Camp:
    """Servers that agree; the answer of the most precise of them speaks for all."""

    speaker: RecordedCall
    servers: list[SpanServer]


class Ballot:
    """The answers to one question about a span, in camps of those that agree. Holds one answer for each camp.

    question: (rows, positions, hidden size). difference: the largest of two answers that do not agree.
    """

    def __init__(self, question: torch.Tensor, span: Span):
        self.question = question
        self.span = span
        self.camps: list[Camp] = []
        self.difference = 0.0

    def add(self, answer: RecordedCall) -> None:
        """Put a server's answer to those that it agrees with."""
        for camp in self.camps:
            apart, allowed = agree(self.question, camp.speaker, answer, len(self.span))
            if apart <= allowed:
                camp.servers.append(answer.hop.server)
                if _allowed(answer) < _allowed(camp.speaker):
                    camp.speaker = answer
                return
            self.difference = max(self.difference, apart)
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
        if len(largest.servers) * 2 > len(voters):
            others = tuple(server.peer_id for server in largest.servers)
            odd = [server for server in voters if server not in largest.servers]
            return tuple(TrustFinding(server, "wrong", self.span, self.difference, others=others) for server in odd)
        return tuple(
            TrustFinding(
                server,
                "disputed",
                self.span,
                self.difference,
                others=tuple(other.peer_id for other in voters if other is not server),
                is_used=True,
            )
            for server in voters
        )
