"""Activations: hidden states on their way through blocks, without gradients. Who decides asks them for sizes only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petals_eval.errors import GradientError

__all__ = ["Activations", "refuse_gradients"]


def refuse_gradients(hidden: torch.Tensor, prompts: torch.Tensor | None) -> None:
    """Raise GradientError when grad is enabled and one of the tensors requires it: what came back would have none."""
    if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
        raise GradientError(
            "the remote path computes no gradients: expected hidden states without grad, found one that requires "
            "it. Evaluate under torch.inference_mode() or torch.no_grad(), or detach() what you pass."
        )


@dataclass(frozen=True, eq=False, slots=True)
class Activations:
    """What enters a block.

    hidden: (rows, positions, hidden size). start: the block they enter.
    prompts: (blocks from `start` on, rows or 1, prefix, hidden size), added to the first positions before each block,
        or None.
    """

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    start: int = 0

    @property
    def rows(self) -> int:
        """Texts, or parts of texts."""
        return self.hidden.shape[0]

    @property
    def positions(self) -> int:
        """Positions of each row."""
        return self.hidden.shape[1]

    @property
    def tokens(self) -> int:
        """Rows times positions."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    @property
    def hidden_size(self) -> int:
        """Values of each position."""
        return self.hidden.shape[2]

    @property
    def values(self) -> int:
        """Values of all positions."""
        return self.hidden.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states in memory."""
        return self.hidden.nbytes

    def entering(self, start: int, stop: int) -> "Activations":
        """Return the same hidden states with the prompts of blocks start:stop alone."""
        if self.prompts is None:
            return self
        return Activations(self.hidden, self.prompts[start - self.start : stop - self.start], start)

    def after(self, hidden: torch.Tensor, block: int) -> "Activations":
        """Return what enters `block`, given the answer of the blocks before it."""
        return Activations(hidden, None if self.prompts is None else self.prompts[block - self.start :], block)

    def by_rows(self, at_once: int) -> Sequence["Activations"]:
        """Return the parts of at most `at_once` rows."""
        if self.rows <= at_once:
            return [self]
        return [self._rows(slice(start, start + at_once)) for start in range(0, self.rows, at_once)]

    def by_positions(self, at_once: int) -> Sequence["Activations"]:
        """Return the steps of at most `at_once` positions, in order."""
        return [self._positions(slice(start, start + at_once)) for start in range(0, self.positions, at_once)]

    def _rows(self, rows: slice) -> "Activations":
        prompts = self.prompts
        if prompts is not None and prompts.shape[1] != 1:
            prompts = prompts[:, rows]
        return Activations(self.hidden[rows], prompts, self.start)

    def _positions(self, positions: slice) -> "Activations":
        prompts = None if self.prompts is None else self.prompts[:, :, positions]
        return Activations(self.hidden[:, positions], prompts, self.start)
