"""A prompt-tuned checkpoint, checked against the model it is for."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from petals_eval.errors import AdapterError
from petals_eval.model.families import Family
from petals_eval.model.tensor_files import Tensors, tensor_bytes

__all__ = ["Adapter", "AdapterReader", "Kind", "hash_tensors"]

Kind = Literal["none", "ptune", "deep_ptune", "peft-prompt_tuning", "peft-p_tuning"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Tuned prompts and the head that was trained with them.

    name: the folder's or file's own name, or the hub name; never a path.
    prompts: (prefix, hidden) float32, put in front of the embedded text; None: no prompts.
    deep_prompts: (blocks, 1, prefix, hidden) float32, added to the first `prefix` positions of each block's input; or
        None. Petals casts both to the dtype of the embeddings when it uses them.
    head_weight: (labels, hidden) and head_bias: (labels,) as stored; None where the checkpoint holds no head.
    sha256: over names, shapes, dtypes and bytes of these tensors: the same on every machine and in every file format.
    """

    name: str
    kind: Kind
    prompts: torch.Tensor | None = None
    deep_prompts: torch.Tensor | None = None
    head_weight: torch.Tensor | None = None
    head_bias: torch.Tensor | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", hash_tensors(self._tensors()))

    @property
    def prefix_length(self) -> int:
        """Tokens that the prompts take in front of every text."""
        return 0 if self.prompts is None else self.prompts.shape[0]

    def without_prompts(self) -> "Adapter":
        """The same head without the prompts: what the prompts are compared with."""
        return replace(
            self, name=f"{self.name} without prompts", kind="none", prompts=None, deep_prompts=None, sha256=""
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {
            "prompts": self.prompts,
            "deep_prompts": self.deep_prompts,
            "head_weight": self.head_weight,
            "head_bias": self.head_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256, in hex, over names, shapes, dtypes and bytes (little-endian, as on every machine hivemind runs on)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class AdapterReader:
    """Takes checked tensors out of one adapter file. Every problem becomes an AdapterError that names the file."""

    def __init__(self, path: Path, tensors: Tensors, family: Family, config: Any):
        self.path = path
        self.tensors = tensors
        self.family = family
        self.hidden = family.hidden_size(config)
        self.blocks = family.num_blocks(config)
        self.context = family.context_limit(config)
        self.names = set(tensors.names())

    def first(self, *names: str) -> str | None:
        """The first of these names that the file has."""
        return next((name for name in names if name in self.names), None)

    def matrix(self, name: str, expected: str, columns: int) -> torch.Tensor:
        """The tensor `name`, finite and of shape (rows, columns), as stored. `expected` says the shape in words."""
        tensor = self.tensors.take(name)
        if tensor.ndim != 2 or tensor.shape[1] != columns or tensor.shape[0] == 0:
            raise AdapterError(
                f"{self.path}: {name} has the wrong shape for this {self.family.title} "
                f"(hidden size {self.hidden}, {self.blocks} blocks).\n"
                f"  expected  {expected}\n  found     {tuple(tensor.shape)}\n"
                "  Was it tuned for another model?"
            )
        return self._checked(name, tensor)

    def prompts(self, name: str) -> torch.Tensor:
        """(prefix, hidden) float32."""
        prompts = self.matrix(name, f"(prefix tokens, {self.hidden})", self.hidden)
        if self.context is not None and prompts.shape[0] >= self.context:
            raise AdapterError(
                f"{self.path}: {name} holds {prompts.shape[0]} prompt tokens, which leaves no room for text: "
                f"the model reads {self.context} positions. Was it tuned for another model?"
            )
        return prompts.float()

    def head(self, weight: str | None, bias: str | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The head under these names: (labels, hidden) and (labels,) or None, as stored."""
        if weight is None:
            return None, None
        matrix = self.matrix(weight, f"(labels, {self.hidden})", self.hidden)
        if bias is None:
            return matrix, None
        vector = self.tensors.take(bias)
        if tuple(vector.shape) != (matrix.shape[0],):
            raise AdapterError(
                f"{self.path}: {bias} has the wrong shape.\n"
                f"  expected  ({matrix.shape[0]},), a number for each label of {weight}\n"
                f"  found     {tuple(vector.shape)}"
            )
        return matrix, self._checked(bias, vector)

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise AdapterError(f"{self.path}: {name} is {tensor.dtype}; expected floating point numbers.")
        tensor = tensor.detach().clone()  # of its own: the file may be mapped into memory
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise AdapterError(
                f"{self.path}: {name} holds {bad} values that are not finite (NaN or infinite); expected none. "
                "Did the training diverge? Take an earlier checkpoint."
            )
        return tensor
