"""Micro-batches as a caller of a stream has them: what it sends, and what it gets back. Data alone."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from petals_eval.swarm.lanes.prefix import LaneSize, Prefix
from petals_eval.swarm.pipeline import ServedHop

__all__ = ["Computed", "Failed", "Work"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Work(Generic[T]):
    """A micro-batch to be computed.

    hidden: (rows, positions, hidden size). prompts: (blocks, rows or 1, prefix, hidden size), or None.
    prefix: what stands before the rows, deep prompts included; the positions of `hidden` come after it, and come back
        alone. lane: the size of a lane for it.
    """

    tag: T
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    prefix: Prefix | None = None
    lane: LaneSize | None = None


@dataclass(frozen=True, eq=False)
class Computed(Generic[T]):
    """A micro-batch that was computed.

    hidden: (rows, positions, hidden size) in the last server's dtype. hops: who computed it, in order.
    """

    tag: T
    hidden: torch.Tensor
    hops: tuple[ServedHop, ...]


@dataclass(frozen=True, eq=False)
class Failed(Generic[T]):
    """A micro-batch that was not computed, and why."""

    tag: T
    error: Exception
