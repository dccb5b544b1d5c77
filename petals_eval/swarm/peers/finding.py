"""What was found out about a server that cannot be counted on. No I/O."""

from dataclasses import dataclass
from typing import Literal

from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Status", "TrustFinding", "Witness"]

Status = Literal["wrong", "nondeterministic", "disputed"]
"""nondeterministic: two answers to one question. wrong: another answer than two others, than blocks at home, or than
its own when it was asked again. disputed: another answer than others, and nobody to settle who is right."""

Witness = Literal["others", "home", "itself", "call"]
"""call: what the same server answers in one call, where its session had gone back."""


@dataclass(frozen=True, slots=True)
class TrustFinding:
    """What is held against a server, and by whom.

    blocks: those in question.
    difference: of two answers, relative to what the blocks did to the question.
    excess: how many times what rounding explains; 0 where it was not measured.
    others: peer ids it was held against; none where that was itself or blocks at home.
    witness: against whom a wrong server was found out.
    is_used: whether it is used all the same: it is disputed, or nobody else holds its blocks and the settings allow it.
    """

    server: SpanServer
    status: Status
    blocks: Span
    difference: float
    excess: float = 0.0
    others: tuple[str, ...] = ()
    witness: Witness = "others"
    is_used: bool = False
