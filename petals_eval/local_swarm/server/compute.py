"""Where a server's arithmetic happens: in one thread of its own, so that the event loop stays free."""

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from petals_eval.local_swarm.work import Work
from petals_eval.model.blocks import BlockSpan

__all__ = ["SpanThread"]


class SpanThread:
    """Runs a span's work one after the other in a thread of its own. It is a `Compute`."""

    def __init__(self, blocks: BlockSpan, max_batch_size: int, max_chunk_bytes: int):
        """
        max_batch_size: tokens (batch x seq) that a call or step may have.
        max_chunk_bytes: bytes of attention weights at once; a longer step of a session is computed in chunks.
        """
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_chunk_bytes = max_chunk_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")

    async def __call__(self, work: Work) -> torch.Tensor:
        """Return the work's hidden states after its blocks.

        Raises ValueError above `max_batch_size` tokens, in the words of Petals' servers.
        """
        self._check_size(work)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    async def gradients(self, work: Work, grad_outputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the gradients by the work's hidden states and, where it has any, by its prompts.

        grad_outputs: (batch, seq, hidden), by the hidden states after its blocks. Raises as a call does.
        """
        self._check_size(work)
        backward = functools.partial(self.blocks.backward, start=work.span.start, stop=work.span.stop)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, backward, work.hidden, grad_outputs, work.prompts
        )

    def _check_size(self, work: Work) -> None:
        batch, seq = work.hidden.shape[:2]
        if batch * seq > self.max_batch_size:
            raise ValueError(f"Task size greater than max_batch_size ({self.max_batch_size}), it can't be processed")

    def _run(self, work: Work) -> torch.Tensor:
        blocks = functools.partial(self.blocks.forward, start=work.span.start, stop=work.span.stop, cache=work.cache)
        if work.cache is None:
            return blocks(work.hidden, work.prompts)
        chunk = self._chunk_length(work.hidden, work.cache.get_seq_length())
        outputs = []
        for start in range(0, work.hidden.shape[1], chunk):
            hidden = work.hidden[:, start : start + chunk]
            prompts = None
            if work.prompts is not None and start < work.prompts.shape[2]:
                prompts = work.prompts[:, :, start : start + chunk]
            outputs.append(blocks(hidden, prompts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _chunk_length(self, hidden: torch.Tensor, cached: int) -> int:
        """Positions whose attention weights over all positions so far fit into `max_chunk_bytes`, as Petals reckons."""
        batch, seq, _ = hidden.shape
        per_position = self.blocks.attention_heads * batch * self.blocks.dtype.itemsize * (cached + seq)
        return max(1, self.max_chunk_bytes // per_position)

    def close(self) -> None:
        """Let the work in progress end and drop what waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)
