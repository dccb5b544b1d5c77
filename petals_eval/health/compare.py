"""Do two servers compute the same? The tolerance, and what a majority says. Pure functions, no I/O.

`agree` is the one place that knows a tolerance.
"""

import math
from dataclasses import dataclass, field

import torch

from petals_eval.swarm.trust.determinism import TOLERANCE, difference

__all__ = ["Answered", "Votes", "agree"]

_QUANTISED = {"int8": 0.25, "nf4": 0.6}
"""The `difference` that a quantised server may have: a guess on the safe side of the weights' own rounding, which is
0.2 to 0.5% for int8 and 7 to 10% for nf4, each matrix of a block adding to it."""
_OTHER_QUANT = 0.6  # a word nobody knows


@dataclass(frozen=True, slots=True)
class Answered:
    """A server's answer (rows, positions, hidden) to a question, with what its rounding depends on."""

    peer_id: str
    hidden: torch.Tensor
    quant_type: str | None


def agree(question: torch.Tensor, one: Answered, other: Answered, blocks: int) -> tuple[float, float]:
    """How far two answers to a question are apart, and how far their rounding explains.

    Apart: `determinism.difference`, relative to what the blocks did to the question. Where one of the two was asked
    less (a server with a small limit of tokens), only what both were asked counts: causal blocks compute a beginning
    alike.

    What explains it: the tolerance of `determinism`, which was measured between two ways to compute in one dtype, and
    the rounding of the hidden states on their way, which two dtypes do not share: each block adds to them twice, and n
    independent roundings by up to half an epsilon grow like the root of n. Measured on stories260K (1 and 2 blocks):
    float32 and bfloat16 are 0.9 to 2.2% apart.
    """
    rows = min(one.hidden.shape[0], other.hidden.shape[0])
    positions = min(one.hidden.shape[1], other.hidden.shape[1])
    first, second = (each.hidden[:rows, :positions].float() for each in (one, other))
    question = question[:rows, :positions]
    done = float((first - question).norm())
    size = float(first.norm()) / done if done > 0 else 0.0
    epsilon = max(torch.finfo(each.hidden.dtype).eps for each in (one, other))
    carried = epsilon / 2 * math.sqrt(2 * blocks) * size
    return difference(question, first, second), max(_allowed(one), _allowed(other)) + carried


def _allowed(answer: Answered) -> float:
    rounding = TOLERANCE[answer.hidden.dtype]
    quant = answer.quant_type or "none"
    return rounding if quant == "none" else max(rounding, _QUANTISED.get(quant, _OTHER_QUANT))


@dataclass(slots=True)
class _Camp:
    """Servers that agree; the most precise of them speaks for all."""

    speaker: Answered
    members: list[str]


@dataclass(slots=True)
class Votes:
    """The answers to one question, in camps of those that agree. Holds one answer for each camp."""

    question: torch.Tensor
    blocks: int
    camps: list[_Camp] = field(default_factory=list)
    apart: float = 0.0

    def add(self, answer: Answered) -> None:
        for camp in self.camps:
            apart, allowed = agree(self.question, camp.speaker, answer, self.blocks)
            if apart <= allowed:
                camp.members.append(answer.peer_id)
                if _allowed(answer) < _allowed(camp.speaker):
                    camp.speaker = answer
                return
            self.apart = max(self.apart, apart)
        self.camps.append(_Camp(answer, [answer.peer_id]))

    def voters(self) -> tuple[str, ...]:
        return tuple(peer for camp in self.camps for peer in camp.members)

    def outvoted(self) -> dict[str, int]:
        """Servers that most others contradict, each with how many those are."""
        largest = self._majority()
        if largest is None:
            return {}
        others = [peer for camp in self.camps if camp is not largest for peer in camp.members]
        return dict.fromkeys(others, len(largest.members))

    def disputed(self) -> tuple[str, ...]:
        """Everybody, where they disagree and no camp is larger than all others together."""
        return self.voters() if len(self.camps) > 1 and self._majority() is None else ()

    def _majority(self) -> _Camp | None:
        total = sum(len(camp.members) for camp in self.camps)
        return next((camp for camp in self.camps if len(camp.members) * 2 > total and len(camp.members) > 1), None)
