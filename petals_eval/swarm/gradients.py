"""The remote path computes no gradients, and says so rather than return tensors that silently have none."""

import torch

from petals_eval.errors import GradientError

__all__ = ["refuse_gradients"]


def refuse_gradients(hidden: torch.Tensor, prompts: torch.Tensor | None) -> None:
    """Raises GradientError when grad is enabled and one of the tensors requires it."""
    if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
        raise GradientError(
            "the remote path computes no gradients: expected hidden states without grad, found one that requires "
            "it. Evaluate under torch.inference_mode() or torch.no_grad(), or detach() what you pass."
        )
