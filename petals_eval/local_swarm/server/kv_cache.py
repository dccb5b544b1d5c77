"""The keys and values of an inference session: reserved once, appended to, rolled back, reordered."""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["SessionCache"]


class SessionCache(Cache):
    """Room for `max_length` positions in each of `num_blocks` blocks, in the form that Hugging Face's models take.

    offset: the number of the first of these blocks in the whole model.
    The room is taken when the first keys come, for as many rows as they have.
    """

    def __init__(self, num_blocks: int, max_length: int, offset: int = 0):
        # Full layers even where attention has a window (the mask cuts it): a window's layer cannot be rolled back.
        self._layers = [_ReservedLayer(max_length) for _ in range(num_blocks)]
        super().__init__(layers=self._layers)
        self._offset = offset

    @property
    def length(self) -> int:
        """Positions that it holds."""
        return self._layers[0].length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states, value_states, layer_idx - self._offset, *args, **kwargs)

    def roll_back(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        for layer in self._layers:
            layer.length = length

    def reorder(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        for layer in self._layers:
            layer.reorder_cache(rows)


class _ReservedLayer(CacheLayerMixin):
    """One block's keys and values, each (batch, heads, max_length, head size), of which `length` positions are used."""

    is_sliding = False

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_empty((*key_states.shape[:2], self.max_length, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], self.max_length, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @torch.inference_mode()  # what was made under it can be changed under it only
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys[:, :, : self.length] = self.keys[beam_idx, :, : self.length]
            self.values[:, :, : self.length] = self.values[beam_idx, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length
