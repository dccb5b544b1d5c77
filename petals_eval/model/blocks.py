"""Real Hugging Face blocks: a span of a model's blocks, and nothing else of the model, in memory."""

import copy
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petals_eval.errors import ModelError
from petals_eval.model.arithmetic import isolated_arithmetic
from petals_eval.model.block_weights import load_block
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.model.families import Family

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig

__all__ = ["DTYPES", "BlockSpan", "check_blocks"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# transformers imports its parts when they are first used, and does not survive two threads doing so at once.
_LOADING = threading.Lock()


class BlockSpan:
    """Blocks first:last of a model, in evaluation mode, without gradients.

    The blocks sit in Hugging Face's own base model with the embeddings and the final norm taken out, so that rotary
    positions, alibi, causal and sliding masks and the key-value cache are Hugging Face's for every family.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, first: int, last: int, dtype: torch.dtype):
        self.first, self.last, self.dtype = first, last, dtype
        self.config: PretrainedConfig = checkpoint.config  # of the whole model
        self.family = checkpoint.family
        self._model = model
        self._views: dict[tuple[int, int], nn.Module] = {(first, last): model}
        self._computing = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        first: int,
        last: int,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
    ) -> "BlockSpan":
        """Load blocks first:last of a local folder or a repository of the hub; `dtype` None keeps the checkpoint's.

        Raises ModelError: no such model, an unknown family, blocks it does not have, missing or misshapen weights.
        """
        with _LOADING, isolated_arithmetic():
            checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
            check_blocks(first, last, checkpoint.family.num_blocks(checkpoint.config), checkpoint.name)
            dtype = dtype or checkpoint.config.dtype or torch.float32
            return cls(_base_model(checkpoint, first, last, dtype), checkpoint, first, last, dtype)

    @property
    def hidden_size(self) -> int:
        return self.family.hidden_size(self.config)

    @property
    def num_blocks(self) -> int:
        """How many blocks the whole model has."""
        return self.family.num_blocks(self.config)

    @property
    def attention_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """How many heads' keys and values a cache holds: fewer than the attention heads under grouped queries."""
        if self.config.model_type == "falcon":
            if self.config.multi_query and not self.config.new_decoder_architecture:
                return 1
            return self.config.num_kv_heads
        return getattr(self.config, "num_key_value_heads", None) or self.attention_heads

    @property
    def head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.hidden_size // self.attention_heads

    @property
    def cache_bytes_per_token(self) -> int:
        """The size of the keys and values of one token in one block."""
        return 2 * self.key_value_heads * self.head_size * self.dtype.itemsize

    def drop_out(self, p: float) -> None:
        """Run the blocks in training mode, with dropout `p` on all the family can drop; 0: in evaluation mode again."""
        for block in _blocks_of(self._model, self.family):
            for module in block.modules():
                if isinstance(module, nn.Dropout):
                    module.p = p
                for owner in (module, getattr(module, "config", None)):
                    for name, value in list(vars(owner).items()) if owner is not None else ():
                        if "dropout" in name and isinstance(value, (int, float)):
                            setattr(owner, name, p)
            block.train(p > 0)

    def copied(self) -> "BlockSpan":
        """Return the same blocks, with weights of their own."""
        other = copy.copy(self)
        with self._computing:  # not with the prompts of a call
            other._model = copy.deepcopy(self._model)
        other._views = {(self.first, self.last): other._model}
        other._computing = threading.Lock()
        return other

    def shuffled(self, seed: int) -> "BlockSpan":
        """Return blocks of other weights: each matrix has its rows in another order, which `seed` draws."""
        other = self.copied()
        draws = torch.Generator().manual_seed(seed)
        for parameter in _blocks_of(other._model, self.family).parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data[torch.randperm(len(parameter), generator=draws)]
        return other

    @torch.inference_mode()
    def forward(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        cache: "Cache | None" = None,
    ) -> torch.Tensor:
        """Run blocks first:last, by default all of the span, on hidden states (batch, seq, hidden).

        prompts: (blocks, batch or 1, prefix, hidden), each added to the first `prefix` positions before its block.
            Fewer than blocks: the blocks beyond them are skipped, as Petals servers do.
        cache: keys and values of the positions before these; the new ones are appended.

        Returns hidden states of the input's shape in the span's dtype. The input is left as it was.
        """
        first = self.first if first is None else first
        last = self.last if last is None else last
        if prompts is not None:
            last = min(last, first + len(prompts))
        hidden = hidden.to(self.dtype)
        if hidden.numel() == 0:
            return hidden
        # One at a time: prompts come in by hooks on the blocks, which would act on whatever else is computed there.
        with self._computing, isolated_arithmetic(), ExitStack() as hooks:
            model = self._view(first, last)
            if prompts is not None:
                if prompts.shape[2] > hidden.shape[1]:
                    raise ValueError(
                        f"expected at least as many positions as prompt tokens ({prompts.shape[2]}), "
                        f"found {hidden.shape[1]}"
                    )
                for block, prompt in zip(_blocks_of(model, self.family), prompts.to(self.dtype), strict=False):
                    hooks.enter_context(block.register_forward_pre_hook(_adds(prompt)))
            return model(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def _view(self, first: int, last: int) -> nn.Module:
        """Return the base model around blocks first:last only; it shares their weights."""
        if (first, last) not in self._views:
            if not self.first <= first < last <= self.last:
                raise ValueError(f"expected blocks within {self.first}:{self.last}, found {first}:{last}")
            view = copy.copy(self._model)
            view._modules = dict(self._model._modules)
            start, end = first - self.first, last - self.first
            # From the model's own config, which knows the attention implementation that was chosen for it.
            view.config = _sliced(self._model.config, start, end)
            setattr(view, self.family.blocks, _blocks_of(self._model, self.family)[start:end])
            self._views[first, last] = view
        return self._views[first, last]


def check_blocks(first: int, last: int, num_blocks: int, model: str) -> None:
    """Raise ModelError where a model of so many blocks has no blocks first:last."""
    if not 0 <= first < last <= num_blocks:
        raise ModelError(f"expected a span within 0:{num_blocks}, the blocks of {model}, found {first}:{last}")


def _base_model(checkpoint: Checkpoint, first: int, last: int, dtype: torch.dtype) -> nn.Module:
    """Load Hugging Face's base model with blocks first:last and nothing around them."""
    from transformers import AutoModel

    family, config = checkpoint.family, _sliced(checkpoint.config, first, last)
    # No memory and no time for weights that are about to be replaced. float32 whatever comes: any other would be the
    # default dtype of every thread while this line runs.
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32)
    for module in (family.embeddings, family.embedding_norm, family.final_norm):
        if module is not None:  # it stays on the client
            setattr(model, module, nn.Identity())
    if hasattr(model, "rotary_emb"):  # its frequencies are a buffer no checkpoint holds
        model.rotary_emb = type(model.rotary_emb)(config=config)
    _fill(model, checkpoint, first, dtype)
    return model.eval().requires_grad_(False)


def _adds(prompt: torch.Tensor) -> Any:
    """Return a hook that adds a deep prompt (batch or 1, prefix, hidden) to the hidden states that enter a block."""

    def add(block: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].clone()  # the caller's tensor, or a residual somebody still needs
        hidden[:, : prompt.shape[1]] += prompt
        return hidden, *args[1:]

    return add


def _blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    return getattr(model, family.blocks)


def _sliced(config: "PretrainedConfig", first: int, last: int) -> "PretrainedConfig":
    """Return the config of a model that has blocks first:last only; some families choose a window block by block."""
    config = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    config.num_hidden_layers = last - first
    if layer_types is not None:
        config.layer_types = layer_types[first:last]
    return config


def _fill(model: nn.Module, checkpoint: Checkpoint, first: int, dtype: torch.dtype) -> None:
    """Give the blocks of `model`, which counts them from 0, their weights from block `first` on."""
    state: dict[str, torch.Tensor] = {}
    blocks = _blocks_of(model, checkpoint.family)
    for index, block in enumerate(blocks):
        parameters = dict(block.named_parameters())
        for name, tensor in load_block(checkpoint, first + index, parameters).items():
            if tensor.shape != parameters[name].shape:
                raise ModelError(
                    f"{checkpoint.name}: expected {name} of block {first + index} to be "
                    f"{tuple(parameters[name].shape)} by the config, found {tuple(tensor.shape)} in the weights"
                )
            state[f"{index}.{name}"] = tensor.to(dtype)
    blocks.load_state_dict(state, assign=True)
    left = [key for key, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"this transformers keeps tensors the stub does not know how to fill: {', '.join(left[:4])}")
