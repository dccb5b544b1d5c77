"""Hugging Face's own forward, as the reference, and its blocks alone, in the place of a swarm."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from petals_eval.data.batching import MicroBatch
from petals_eval.model import Adapter, LocalModel
from petals_eval.tasks.requests import Request

TOKENS = (1, 75, 86, 279, 262, 14, 268, 90, 17)
PREFIX = 4


def causal_lm(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def classifier(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def make_adapter(local: LocalModel, kind: str, *, labels: int | None = None, seed: int = 1) -> Adapter | None:
    """A random adapter: none, ptune or deep_ptune."""
    if kind == "none" and labels is None:
        return None
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=generator)

    return Adapter(
        name="random",
        kind=kind,
        prompts=None if kind == "none" else noise(PREFIX, local.hidden_size),
        deep_prompts=noise(local.num_blocks, 1, PREFIX, local.hidden_size) if kind == "deep_ptune" else None,
        head_weight=None if labels is None else noise(labels, local.hidden_size),
    )


@contextmanager
def deep_prompts_added(model: nn.Module, local: LocalModel, adapter: Adapter | None) -> Iterator[None]:
    """Add each block's prompts to the first positions of its input, as a Petals server does."""
    hooks = []
    if adapter is not None and adapter.deep_prompts is not None:
        for block, prompts in zip(_blocks(model, local), adapter.deep_prompts, strict=True):

            def add(module, args, kwargs, prompts=prompts):
                hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                hidden[:, : prompts.shape[1]] += prompts.to(hidden.dtype)
                return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

            hooks.append(block.register_forward_pre_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def full_logits(model: nn.Module, local: LocalModel, adapter: Adapter | None, tokens=TOKENS) -> torch.Tensor:
    """The logits of Hugging Face's whole model on one unpadded text: (seq, vocabulary) or (labels,)."""
    hidden = model.get_input_embeddings()(torch.tensor([tokens]))
    prefix = 0
    if adapter is not None and adapter.prompts is not None:
        prefix = adapter.prefix_length
        hidden = torch.cat([adapter.prompts.to(hidden.dtype)[None], hidden], dim=1)
    with deep_prompts_added(model, local, adapter):
        logits = model(inputs_embeds=hidden).logits[0]
    return logits[prefix:] if logits.ndim == 2 else logits


@torch.no_grad()
def run_blocks(model: nn.Module, local: LocalModel, hidden: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    """What a swarm does: (batch, seq, hidden) through the blocks and nothing else."""
    base = _text_model(model)
    kept = {}
    for name in filter(None, (local.family.embedding_norm, local.family.final_norm)):
        kept[name] = getattr(base, name)
        setattr(base, name, nn.Identity())
    try:
        with deep_prompts_added(model, local, adapter):
            return base(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        for name, module in kept.items():
            setattr(base, name, module)


def local_answers(
    model: nn.Module, local: LocalModel, adapter: Adapter | None, requests: list[Request]
) -> list[torch.Tensor]:
    """The answers by the local side, with the blocks of `model` in between."""
    batch = MicroBatch.of(requests)
    hidden = local.embed(batch.input_ids, adapter)
    return local.head(run_blocks(model, local, hidden, adapter), batch, adapter)


def _blocks(model: nn.Module, local: LocalModel) -> nn.ModuleList:
    return getattr(_text_model(model), local.family.blocks)


def _text_model(model: nn.Module) -> nn.Module:
    """The base model, or the language model in a multimodal one."""
    return getattr(model.base_model, "language_model", model.base_model)
