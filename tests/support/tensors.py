"""Hidden states to send, and how far the ones that come back are from what they should be."""

import math

import torch


def hidden_states(batch: int, seq: int, size: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Normal random hidden states (batch, seq, size), the same ones for the same seed."""
    return torch.randn(batch, seq, size, generator=torch.Generator().manual_seed(seed))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; shape and dtype must be the expected ones."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert math.isfinite(float(found.float().sum()))
    return float((found - expected).abs().max() / expected.abs().max())


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether all differ by less than `tolerance` of the largest expected value."""
    assert found.shape == expected.shape
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def tf32(values: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to the 10 bits of mantissa that a GPU keeps of them where it multiplies in TF32."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
