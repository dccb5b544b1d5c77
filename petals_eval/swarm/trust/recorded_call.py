"""A call as it was made and answered: what an audit computes again."""

from dataclasses import dataclass, replace

import torch

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.trust.tolerance import Kind

__all__ = ["RecordedCall"]


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """What a server answered.

    activations: what entered the hop's first block. answer: (rows, positions, hidden size), what left the last one.
    positions_per_step: of the session it was computed in, or None. seconds: it took.
    """

    hop: Hop
    activations: Activations
    answer: torch.Tensor
    positions_per_step: int | None = None
    seconds: float = 0.0

    @property
    def kind(self) -> Kind:
        """What the server computes with: the dtype of its answer, and its own word on quantisation."""
        return Kind.of(self.answer.dtype, self.hop.server.record.quant_type)

    def copied(self) -> "RecordedCall":
        """Return the same with tensors of its own."""
        entered = replace(self.activations, hidden=self.activations.hidden.clone())
        return replace(self, activations=entered, answer=self.answer.clone())
