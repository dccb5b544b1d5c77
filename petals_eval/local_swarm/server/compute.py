"""Where a server's arithmetic happens: one thread, so that the event loop stays free, behind one seam."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from petals_eval.model.blocks import BlockSpan

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Compute", "Middleware", "SpanThread", "Work", "wrapped"]


@dataclass(frozen=True, eq=False)
class Work:
    """Blocks first:last applied to hidden states (batch, seq, hidden).

    method: the RPC it came by.
    prompts: (blocks, batch or 1, prefix, hidden) or None.
    remote: peer id of the client, base58.
    cache: keys and values of the positions before these, in an inference session.
    """

    method: str
    first: int
    last: int
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    active_adapter: str
    remote: str
    cache: "Cache | None" = None


Compute = Callable[[Work], Awaitable[torch.Tensor]]
Middleware = Callable[[Work, Compute], Awaitable[torch.Tensor]]


def wrapped(compute: Compute, middleware: Sequence[Middleware]) -> Compute:
    """`compute` behind the middleware: the first of them sees the work first and the answer last."""
    for layer in reversed(middleware):
        compute = _behind(layer, compute)
    return compute


def _behind(layer: Middleware, inner: Compute) -> Compute:
    def call(work: Work) -> Awaitable[torch.Tensor]:
        return layer(work, inner)

    return call


class SpanThread:
    """Runs a span's work one after the other in a thread of its own. A `Compute`."""

    def __init__(self, span: BlockSpan, max_batch_size: int, max_chunk_bytes: int):
        """
        max_batch_size: tokens (batch x seq) of a call or step at most.
        max_chunk_bytes: of attention weights; a longer step of a session is computed in chunks.
        """
        self.span = span
        self.max_batch_size = max_batch_size
        self.max_chunk_bytes = max_chunk_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"blocks {span.first}:{span.last}")

    async def __call__(self, work: Work) -> torch.Tensor:
        """Raises ValueError above `max_batch_size` tokens, in the words of Petals' servers."""
        batch, seq = work.hidden.shape[:2]
        if batch * seq > self.max_batch_size:
            raise ValueError(f"Task size greater than max_batch_size ({self.max_batch_size}), it can't be processed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Work) -> torch.Tensor:
        if work.cache is None:
            return self.span.forward(work.hidden, work.prompts, first=work.first, last=work.last)
        chunk = self._chunk_length(work)
        outputs = []
        for start in range(0, work.hidden.shape[1], chunk):
            hidden = work.hidden[:, start : start + chunk]
            prompts = None
            if work.prompts is not None and start < work.prompts.shape[2]:
                prompts = work.prompts[:, :, start : start + chunk]
            outputs.append(self.span.forward(hidden, prompts, first=work.first, last=work.last, cache=work.cache))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _chunk_length(self, work: Work) -> int:
        """Positions whose attention weights over all positions so far fit into `max_chunk_bytes`, as Petals reckons."""
        if work.cache is None:
            return work.hidden.shape[1]
        positions = work.cache.get_seq_length() + work.hidden.shape[1]
        per_position = self.span.attention_heads * work.hidden.shape[0] * self.span.dtype.itemsize * positions
        return max(1, self.max_chunk_bytes // per_position)

    def close(self) -> None:
        """Let the work in progress end and drop what waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)
