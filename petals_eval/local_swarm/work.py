"""The seam between what a server is asked and its arithmetic: where faults and measurements are put in."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from petals_eval.swarm.wire.span import Span

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Compute", "ComputeGradients", "Middleware", "Work", "wrapped"]


@dataclass(frozen=True, eq=False)
class Work:
    """Hidden states (batch, seq, hidden) that the blocks of `span` are to be applied to.

    method: the RPC by which they came.
    prompts: deep prompts (blocks, batch or 1, prefix, hidden), or None.
    remote: peer id of the client, base58.
    cache: keys and values of the positions before these, in an inference session.
    """

    method: str
    span: Span
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    active_adapter: str
    remote: str
    cache: "Cache | None" = None


Compute = Callable[[Work], Awaitable[torch.Tensor]]
ComputeGradients = Callable[[Work, torch.Tensor], Awaitable[Sequence[torch.Tensor]]]
Middleware = Callable[[Work, Compute], Awaitable[torch.Tensor]]


def wrapped(compute: Compute, middleware: Sequence[Middleware]) -> Compute:
    """Return `compute` behind the middleware: the first of them sees the work first and the answer last."""
    for layer in reversed(middleware):
        compute = _behind(layer, compute)
    return compute


def _behind(layer: Middleware, inner: Compute) -> Compute:
    def call(work: Work) -> Awaitable[torch.Tensor]:
        return layer(work, inner)

    return call
