"""Live models of the structure that DRIFT's client has on today's transformers; Petals' own has the same.

`drift.models.*.model` (dd294a1): a class made from Hugging Face's, whose base model keeps the prompts as embeddings,
names embeddings and norm as BLOOM does, and has the swarm where the blocks were; the config says where the swarm is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLIENT_CONFIG = {
    "initial_peers": (),
    "dht_prefix": None,
    "daemon_startup_timeout": 60,
    "allowed_servers": None,
    "blocked_servers": None,
    "connect_timeout": 5,
    "request_timeout": 180,
    "min_backoff": 1,
    "max_backoff": 60,
    "active_adapter": None,
    "pre_seq_len": 0,
    "tuning_mode": None,
}
"""The defaults of `drift.client.config.ClientConfig` and `drift.client.ptune.PTuneConfig` that matter here."""


class _Blocks(nn.Module):
    """In the place of the blocks; whoever evaluates has no use for them."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("the client's own way to the swarm was taken")


class _Prompts:
    """What a client adds to a base model. The names are those of `drift.client.ptune.PTuneMixin`."""

    config: Any
    word_embeddings: Any

    def init_prompts(self, config) -> None:
        self.prefix_tokens = torch.arange(config.pre_seq_len, device="meta")  # where transformers 5 leaves it
        self.prompt_embeddings = nn.Embedding(config.pre_seq_len, config.hidden_size)
        if config.tuning_mode == "deep_ptune":
            self.intermediate_prompt_embeddings = nn.Embedding(
                config.pre_seq_len, config.num_hidden_layers * config.hidden_size
            )

    def get_prompt(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        rows = self.prefix_tokens.expand(batch_size, -1).to(self.word_embeddings.weight.device)
        prompts, deep = self.prompt_embeddings(rows), torch.empty(0)
        if config.tuning_mode == "deep_ptune":
            of_blocks = self.intermediate_prompt_embeddings(rows)
            deep = of_blocks.view(*rows.shape, config.num_hidden_layers, config.hidden_size).permute(2, 0, 1, 3)
        dtype = self.word_embeddings.weight.dtype
        return prompts.to(dtype), deep.to(dtype)


class _LlamaLike(_Prompts):
    embed_tokens: nn.Module
    norm: nn.Module

    @property
    def word_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def word_embeddings_layernorm(self) -> nn.Module:
        return nn.Identity()

    @property
    def ln_f(self) -> nn.Module:
        return self.norm


class _HasTransformer:
    model: nn.Module

    @property
    def transformer(self) -> nn.Module:
        return self.model


def live_model(folder: Path, *, labels: int | None = None, initial_peers: Sequence[str] = (), **client: object):
    """The model of a folder as a live one; with `labels` a classifier. client: more of `CLIENT_CONFIG`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder)
    for name, value in {**CLIENT_CONFIG, **client, "initial_peers": tuple(initial_peers)}.items():
        setattr(model.config, name, value)
    base = model.base_model
    is_bloom_like = hasattr(model, "transformer")
    added = _Prompts if is_bloom_like else _LlamaLike
    base.__class__ = type(f"Distributed{type(base).__name__}", (added, type(base)), {})
    setattr(base, "h" if is_bloom_like else "layers", _Blocks())
    if model.config.tuning_mode:
        base.init_prompts(model.config)
    kinds = (type(model),) if is_bloom_like else (_HasTransformer, type(model))
    model.__class__ = type(f"Distributed{type(model).__name__}", kinds, {})
    return model
