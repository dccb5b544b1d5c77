"""The eval-mode guard: a model is evaluated in eval mode and without autograd, and given back as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from petals_eval.model.arithmetic import isolated_arithmetic

__all__ = ["evaluating"]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Run the body with `modules` in eval mode, under `torch.inference_mode()`, in the arithmetic that they name.

    That is whatever surrounds it: autocast, a default device or coarser matrix products (`isolated_arithmetic`).

    Afterwards, also after an exception, every submodule has its own training flag back (they may differ inside one
    model), torch's random generators stand where they stood, and buffers that were made inside are fit for autograd
    again: a training loop around it goes on with the same bits as if nothing had been evaluated.

    Inference mode belongs to the thread: work given to other threads has to enter it there.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    flags = [part.training for part in parts]
    try:
        with (
            torch.random.fork_rng(devices=_cuda_devices(modules)),
            torch.inference_mode(),
            isolated_arithmetic(),
        ):
            for module in modules:
                module.eval()
            yield
    finally:
        for part, training in zip(parts, flags, strict=True):
            if part.training != training:
                part.train(training)  # not the flag alone: some modules do more when they change (merged weights)
        for part, training in zip(parts, flags, strict=True):
            part.training = training  # train() above also reached the submodules, which may have differed
        _free_buffers(parts)


def _cuda_devices(modules: tuple[nn.Module, ...]) -> list[int]:
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    return sorted(
        torch.cuda.current_device() if device.index is None else device.index
        for device in devices
        if device.type == "cuda"
    )


def _free_buffers(parts: list[nn.Module]) -> None:
    """Replace buffers that are inference tensors: autograd refuses those (a cache of rotary angles grown inside)."""
    for part in parts:
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
