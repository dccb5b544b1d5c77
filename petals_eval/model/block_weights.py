"""The weights of one block, found in a checkpoint under the names that its parameters have in memory."""

from collections.abc import Iterable

import torch

from petals_eval.errors import ModelError
from petals_eval.model.checkpoint import Checkpoint

__all__ = ["load_block"]

_IN_MEMORY = "mlp."  # what transformers 5 calls the module that holds router and experts


def load_block(checkpoint: Checkpoint, block: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of block number `block` under `names`, those of its parameters and buffers inside the block.

    In the checkpoint's own dtype. Only the shards that hold them are opened (or fetched from the hub). Raises
    ModelError when one is missing.
    """
    return {name: _load(checkpoint, block, name) for name in names}


def _load(checkpoint: Checkpoint, block: int, name: str) -> torch.Tensor:
    tensor = _find(checkpoint, block, name)
    experts = checkpoint.family.experts
    if tensor is None and experts is not None:
        fused = {f"{_IN_MEMORY}experts.gate_up_proj": experts.gate_up, f"{_IN_MEMORY}experts.down_proj": experts.down}
        if name in fused:
            tensor = _fused(checkpoint, block, f"{experts.module}.experts", fused[name])
        else:
            tensor = _find(checkpoint, block, name.replace(_IN_MEMORY, f"{experts.module}.", 1))
    if tensor is None:
        expected = checkpoint.family.keys(f"{checkpoint.family.blocks}.{block}", name)[0]
        raise ModelError(f"the weights of {checkpoint.name} lack {expected}: is the checkpoint complete?")
    return tensor


def _fused(checkpoint: Checkpoint, block: int, experts: str, matrices: tuple[str, ...]) -> torch.Tensor | None:
    """Return the experts' `matrices` on top of each other, stacked by expert."""
    stacked = []
    for expert in range(checkpoint.config.num_local_experts):
        parts = [_find(checkpoint, block, f"{experts}.{expert}.{matrix}.weight") for matrix in matrices]
        found = [part for part in parts if part is not None]
        if len(found) < len(matrices):
            return None
        stacked.append(torch.cat(found))
    return torch.stack(stacked)


def _find(checkpoint: Checkpoint, block: int, name: str) -> torch.Tensor | None:
    family = checkpoint.family
    return checkpoint.find(*family.keys(f"{family.blocks}.{block}", name))
