"""The weights of one block, found in a checkpoint under the names that its parameters have in memory."""

from collections.abc import Iterable

import torch

from petals_eval.errors import ModelError
from petals_eval.model.checkpoint import Checkpoint

__all__ = ["load_block"]

# transformers 5 calls Mixtral's experts `mlp` and holds them fused; checkpoints have one matrix each.
_MIXTRAL_BLOCK, _MIXTRAL_IN_MEMORY = "block_sparse_moe.", "mlp."
_FUSED_EXPERTS = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}


def load_block(checkpoint: Checkpoint, block: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of block number `block` under `names`, the parameters' names inside the block.

    In the checkpoint's own dtype. Only the shards that hold them are opened (or fetched from the hub). Raises
    ModelError when one is missing.
    """
    return {name: _load(checkpoint, block, name) for name in names}


def _load(checkpoint: Checkpoint, block: int, name: str) -> torch.Tensor:
    tensor = _find(checkpoint, block, name)
    if tensor is None and checkpoint.family.model_type == "mixtral":
        if name in _FUSED_EXPERTS:
            tensor = _fused(checkpoint, block, _FUSED_EXPERTS[name])
        else:
            tensor = _find(checkpoint, block, name.replace(_MIXTRAL_IN_MEMORY, _MIXTRAL_BLOCK, 1))
    if tensor is None:
        expected = checkpoint.family.keys(f"{checkpoint.family.blocks}.{block}", name)[0]
        raise ModelError(f"the weights of {checkpoint.name} lack {expected}: is the checkpoint complete?")
    return tensor


def _fused(checkpoint: Checkpoint, block: int, matrices: tuple[str, ...]) -> torch.Tensor | None:
    """Return the experts' `matrices` on top of each other, stacked by expert."""
    experts = []
    for expert in range(checkpoint.config.num_local_experts):
        parts = [_find(checkpoint, block, f"{_MIXTRAL_BLOCK}experts.{expert}.{matrix}.weight") for matrix in matrices]
        found = [part for part in parts if part is not None]
        if len(found) < len(matrices):
            return None
        experts.append(torch.cat(found))
    return torch.stack(experts)


def _find(checkpoint: Checkpoint, block: int, name: str) -> torch.Tensor | None:
    family = checkpoint.family
    return checkpoint.find(*family.keys(f"{family.blocks}.{block}", name))
