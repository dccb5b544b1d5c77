"""Hugging Face's own blocks, to hold answers against."""

import torch
from torch import nn


class Reference:
    """Hugging Face's base model, called from the hidden states that a client sends to those it gets back."""

    def __init__(self, folder, dtype=torch.float32):
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        self.blocks = self.model.layers if hasattr(self.model, "layers") else self.model.h
        for around in ("embed_tokens", "word_embeddings", "word_embeddings_layernorm", "norm", "ln_f"):
            if hasattr(self.model, around):
                setattr(self.model, around, nn.Identity())

    @torch.no_grad()
    def forward(self, hidden, prompts=None):
        return self.answer(hidden, prompts)

    def gradients(self, hidden, prompts, grad_outputs):
        """By the hidden states, and by the prompts (blocks, batch, prefix, hidden)."""
        inputs = [hidden.clone().requires_grad_(), prompts.clone().requires_grad_()]
        return torch.autograd.grad(self.answer(*inputs), inputs, grad_outputs)

    def answer(self, hidden, prompts=None):
        hooks = []
        for block, prompt in zip(self.blocks, prompts if prompts is not None else (), strict=False):

            def add(module, args, prompt=prompt):
                pad = hidden.shape[1] - prompt.shape[1]
                return args[0] + nn.functional.pad(prompt, (0, 0, 0, pad)), *args[1:]

            hooks.append(block.register_forward_pre_hook(add))
        output = self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return output
