"""Real Hugging Face blocks: a span of a model's blocks, and nothing else of the model, in memory."""

import copy
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
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

__all__ = ["DTYPES", "BlockSpan", "added_prompts", "check_blocks"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {*DTYPES.values(), torch.float64}

# transformers imports its parts when they are first used, and does not survive two threads doing so at once.
_LOADING = threading.Lock()


class BlockSpan:
    """Blocks start:stop of a model, in evaluation mode. Their weights take no gradients.

    The blocks sit in Hugging Face's own base model with the embeddings and the final norm taken out, so that rotary
    positions, alibi, causal and sliding masks and the key-value cache are Hugging Face's for every family.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype):
        self.start, self.stop, self.dtype = start, stop, dtype
        self._inside = dtype
        self.config: PretrainedConfig = checkpoint.config  # of the whole model
        self.family = checkpoint.family
        self._model = model
        self._views: dict[tuple[int, int], nn.Module] = {(start, stop): model}
        self._computing = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str | Path,
        start: int,
        stop: int,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> "BlockSpan":
        """Load blocks start:stop of a local folder or a repository of the hub; `dtype` None keeps the checkpoint's.

        Raises ModelError: no such model, an unknown family, blocks it does not have, missing or misshapen weights.
        """
        with _LOADING, isolated_arithmetic():
            checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
            check_blocks(start, stop, checkpoint.family.num_blocks(checkpoint.config), checkpoint.name)
            dtype = dtype or checkpoint.config.dtype or torch.float32
            return cls(_base_model(checkpoint, start, stop, dtype), checkpoint, start, stop, dtype)

    @property
    def module(self) -> nn.Module:
        """Hugging Face's base model around these blocks, for whoever wants gradients or the blocks in training mode."""
        return self._model

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks within it."""
        return _blocks_of(self._model, self.family)

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
    def cache_bytes_per_token(self) -> int:
        """The size of the keys and values of one token in one block, where blocks differ in the largest."""
        if latent := getattr(self.config, "kv_lora_rank", None):  # DeepSeek caches what it makes keys and values of
            return (latent + self.config.qk_rope_head_dim) * self.dtype.itemsize
        each_block = getattr(self.config, "per_layer_config", [self.config])  # no such list in older transformers
        return max(2 * _key_value_heads(each) * self._head_size(each) for each in each_block) * self.dtype.itemsize

    def _head_size(self, config: "PretrainedConfig") -> int:
        return getattr(config, "head_dim", None) or self.hidden_size // self.attention_heads

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

    def compute_in_float32(self) -> None:
        """Keep the rounded weights and answer in the same dtype, but round nothing on the way: as fused kernels do."""
        self._model.to(torch.float32)
        self._inside = torch.float32

    def compute_in_tf32(self) -> None:
        """Round what enters each matrix product with weights to ten bits of mantissa, as TF32 of NVIDIA's cards does.

        Products within the attention are left as they are. For float32.
        """
        for module in _blocks_of(self._model, self.family).modules():
            if isinstance(module, nn.Linear):
                module.weight.data = _to_tf32(module.weight.data)
                module.register_forward_pre_hook(lambda _, args: (_to_tf32(args[0]), *args[1:]))

    def copied(self) -> "BlockSpan":
        """Return the same blocks, with weights of their own."""
        other = copy.copy(self)
        with self._computing:  # not with the prompts of a call
            other._model = copy.deepcopy(self._model)
        other._views = {(self.start, self.stop): other._model}
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
        start: int | None = None,
        stop: int | None = None,
        cache: "Cache | None" = None,
    ) -> torch.Tensor:
        """Run blocks start:stop, by default all of the span, on hidden states (batch, seq, hidden).

        prompts: (blocks, batch or 1, prefix, hidden), each added to the first `prefix` positions before its block.
            Fewer than blocks: the blocks beyond them are skipped, as Petals servers do.
        cache: keys and values of the positions before these; the new ones are appended.

        Returns hidden states of the input's shape in the span's dtype. The input is left as it was.
        """
        start = self.start if start is None else start
        stop = self.stop if stop is None else stop
        if prompts is not None:
            stop = min(stop, start + len(prompts))
        hidden = hidden.to(self.dtype)
        if hidden.numel() == 0:
            return hidden
        return self._through(hidden, prompts, start, stop, cache)

    def backward(
        self,
        hidden: torch.Tensor,
        grad_outputs: torch.Tensor,
        prompts: torch.Tensor | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients by what enters blocks start:stop, where `grad_outputs` is the one by what leaves them.

        hidden, grad_outputs: (batch, seq, hidden). prompts: as `forward` takes them, for each of the blocks.

        Returns the gradient by the hidden states (batch, seq, hidden), and with prompts that by those, which has all
        rows (blocks, batch, prefix, hidden), in the span's dtype. The blocks are computed anew for it.
        Raises ValueError for prompts of more or fewer blocks.
        """
        start = self.start if start is None else start
        stop = self.stop if stop is None else stop
        if prompts is not None and len(prompts) != stop - start:
            raise ValueError(f"expected prompts for {stop - start} blocks, found {len(prompts)}")
        with torch.enable_grad():
            inputs = [hidden.detach().to(self.dtype, copy=True).requires_grad_()]
            if prompts is not None:
                rows = prompts.detach().to(self.dtype).expand(-1, len(hidden), -1, -1)
                inputs.append(rows.clone().requires_grad_())
            answer = self._through(inputs[0], inputs[1] if prompts is not None else None, start, stop)
            return torch.autograd.grad(answer, inputs, grad_outputs.to(self.dtype))

    def _through(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        start: int,
        stop: int,
        cache: "Cache | None" = None,
    ) -> torch.Tensor:
        hidden = hidden.to(self._inside)
        # One at a time: prompts come in by hooks on the blocks, which would act on whatever else is computed there.
        with self._computing, isolated_arithmetic(), ExitStack() as hooks:
            model = self._view(start, stop)
            if prompts is not None:
                if prompts.shape[2] > hidden.shape[1]:
                    raise ValueError(
                        f"expected at least as many positions as prompt tokens ({prompts.shape[2]}), "
                        f"found {hidden.shape[1]}"
                    )
                rounded = prompts.to(self.dtype).to(self._inside)
                hooks.enter_context(added_prompts(_blocks_of(model, self.family), rounded))
            answer = model(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None)
            return answer.last_hidden_state.to(self.dtype)

    def _view(self, start: int, stop: int) -> nn.Module:
        """Return the base model around blocks start:stop only; it shares their weights."""
        if (start, stop) not in self._views:
            if not self.start <= start < stop <= self.stop:
                raise ValueError(f"expected blocks within {self.start}:{self.stop}, found {start}:{stop}")
            view = copy.copy(self._model)
            view._modules = dict(self._model._modules)
            begin, end = start - self.start, stop - self.start
            # From the model's own config, which knows the attention implementation that was chosen for it.
            view.config = _sliced(self._model.config, begin, end)
            setattr(view, self.family.blocks, _blocks_of(self._model, self.family)[begin:end])
            self._views[start, stop] = view
        return self._views[start, stop]


def added_prompts(blocks: Iterable[nn.Module], prompts: torch.Tensor) -> ExitStack:
    """Return a context in which each block adds its prompt to the first positions of what enters it.

    prompts: (blocks, batch or 1, prefix, hidden), in the dtype of the hidden states; blocks beyond them add nothing.
    """
    with ExitStack() as hooks:
        for block, prompt in zip(blocks, prompts, strict=False):
            hooks.enter_context(block.register_forward_pre_hook(_adds(prompt)))
        return hooks.pop_all()


def check_blocks(start: int, stop: int, num_blocks: int, model: str) -> None:
    """Raise ModelError where a model of so many blocks has no blocks start:stop."""
    if not 0 <= start < stop <= num_blocks:
        raise ModelError(f"expected a span within 0:{num_blocks}, the blocks of {model}, found {start}:{stop}")


def _base_model(checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> nn.Module:
    """Load Hugging Face's base model with blocks start:stop and nothing around them."""
    from transformers import AutoModel

    family = checkpoint.family
    # No memory and no time for weights that are about to be replaced. float32 whatever comes: any other would be the
    # default dtype of every thread while this line runs. All blocks: what one is goes by its number in some families.
    with torch.device("meta"):
        model = AutoModel.from_config(checkpoint.config, dtype=torch.float32)
    for module in (family.embeddings, family.embedding_norm, family.final_norm):
        if module is not None:  # it stays on the client
            setattr(model, module, nn.Identity())
    if hasattr(model, "rotary_emb"):  # its frequencies are a buffer no checkpoint holds
        model.rotary_emb = type(model.rotary_emb)(config=model.config)
    setattr(model, family.blocks, _blocks_of(model, family)[start:stop])
    model.config = _sliced(model.config, start, stop)
    _fill(model, checkpoint, start, dtype)
    return model.eval().requires_grad_(False)


def _key_value_heads(config: "PretrainedConfig") -> int:
    """Return how many heads' keys and values a cache holds: fewer than the attention heads under grouped queries."""
    if config.model_type == "falcon":
        if config.multi_query and not config.new_decoder_architecture:
            return 1
        return config.num_kv_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _adds(prompt: torch.Tensor) -> Any:
    """Return a hook that adds a deep prompt (batch or 1, prefix, hidden) to the hidden states that enter a block."""

    def add(block: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].clone()  # the caller's tensor, or a residual somebody still needs
        hidden[:, : prompt.shape[1]] += prompt
        return hidden, *args[1:]

    return add


def _to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 values to ten bits of mantissa, ties away from zero: 13 bits fewer than they have."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def _blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    return getattr(model, family.blocks)


def _sliced(config: "PretrainedConfig", start: int, stop: int) -> "PretrainedConfig":
    """Return the config that blocks start:stop are called with; some families choose a window block by block."""
    config = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    config.num_hidden_layers = stop - start
    if layer_types is not None:
        config.layer_types = layer_types[start:stop]
    return config


def _fill(model: nn.Module, checkpoint: Checkpoint, start: int, dtype: torch.dtype) -> None:
    """Give the blocks of `model`, which counts them from 0, their weights from block `start` on."""
    state: dict[str, torch.Tensor] = {}
    blocks = _blocks_of(model, checkpoint.family)
    always_float32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for index, block in enumerate(blocks):
        expected = block.state_dict()
        for name, tensor in load_block(checkpoint, start + index, expected).items():
            if tensor.shape != expected[name].shape:
                raise ModelError(
                    f"{checkpoint.name}: expected {name} of block {start + index} to be "
                    f"{tuple(expected[name].shape)} by the config, found {tuple(tensor.shape)} in the weights"
                )
            if tensor.dtype not in _STORED:
                raise ModelError(
                    f"{checkpoint.name}: expected {name} of block {start + index} in {', '.join(DTYPES)}, found "
                    f"{tensor.dtype}. The local swarm serves no quantised weights: give a checkpoint that has none."
                )
            state[f"{index}.{name}"] = tensor.to(torch.float32 if name.endswith(always_float32) else dtype)
    blocks.load_state_dict(state, assign=True)
    left = [key for key, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"this transformers keeps tensors the stub does not know how to fill: {', '.join(left[:4])}")
