"""What micro-batches have in common: a tree of prefixes, and rows that stand after one of them. Data alone."""

from dataclasses import dataclass

import torch

from petals_eval.swarm.activations import Activations

__all__ = ["Entering", "LaneSize", "Prefix", "PrefixedRows"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Positions that several micro-batches have before their own: a node of a tree, known by its identity.

    hidden: (rows or 1, positions, hidden size), what enters the first block; with one row all rows have it.
    before: what stands before it. prompts: deep ones, (blocks, 1, prefix, hidden size), added to the first positions of
    a root alone.
    """

    hidden: torch.Tensor
    before: "Prefix | None" = None
    prompts: torch.Tensor | None = None

    @property
    def path(self) -> tuple["Prefix", ...]:
        """All that stands before the rows, from the root on."""
        return (self,) if self.before is None else (*self.before.path, self)

    @property
    def end(self) -> int:
        """Positions up to its end."""
        return sum(each.hidden.shape[1] for each in self.path)


@dataclass(frozen=True, slots=True)
class LaneSize:
    """What a lane is opened for: so many rows, each of so many positions, prefix included, at most."""

    rows: int
    positions: int


@dataclass(frozen=True, eq=False)
class PrefixedRows:
    """Rows that stand after a prefix.

    hidden: (rows, positions, hidden size) of the rows' own positions. size: of the lane to open for such rows; None:
        as large as they are.
    """

    hidden: torch.Tensor
    prefix: Prefix
    size: LaneSize | None = None

    @property
    def rows(self) -> int:
        """Texts, or parts of texts."""
        return self.hidden.shape[0]

    @property
    def end(self) -> int:
        """Positions of each row, those of the prefix included."""
        return self.prefix.end + self.hidden.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' own hidden states in memory."""
        return self.hidden.nbytes

    @property
    def lane_size(self) -> LaneSize:
        """What a lane must be opened for to take these rows."""
        wanted = self.size or LaneSize(0, 0)
        return LaneSize(max(self.rows, wanted.rows), max(self.end, wanted.positions))

    def whole(self, start: int) -> Activations:
        """Return all of it, as it enters block `start` in a forward call."""
        path = self.prefix.path
        before = [each.hidden.expand(self.rows, -1, -1) for each in path]
        return Activations(torch.cat([*before, self.hidden], dim=1), path[0].prompts, start)


Entering = Activations | PrefixedRows
"""What is sent through blocks: all positions of its rows, or those that stand after a prefix."""
