"""Arithmetic that is a wait: a server at an accelerator's pace that leaves this machine's processors to the client.

On a machine with few processors real arithmetic and the client share them, and every figure is bound by them. Users'
servers are elsewhere.
"""

import asyncio

import torch

from petals_eval.local_swarm.server.kv_cache import SessionCache
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.local_swarm.work import Work

__all__ = ["PacedSpan"]

_STEP = 2.0**-12  # what a block adds, times a position's place: little beside hidden states, and exact in float32


class PacedSpan:
    """Takes one call after the other, each for the seconds that the settings say. It is a `Compute`.

    A block adds to each position a number that depends on its place alone, so that replicas agree, whatever part of the
    blocks each of them computes, and a session that goes back is told from one that appends.
    """

    def __init__(self, settings: ServerSettings):
        """settings: with a pace."""
        self._settings = settings
        self._free_at = 0.0

    async def __call__(self, work: Work) -> torch.Tensor:
        """Return the work's hidden states after its blocks.

        Raises ValueError above `max_batch_size` tokens, in the words of Petals' servers.
        """
        settings, clock = self._settings, asyncio.get_running_loop().time
        batch, seq = work.hidden.shape[:2]
        if batch * seq > settings.max_batch_size:
            limit = f"max_batch_size ({settings.max_batch_size})"
            raise ValueError(f"Task size greater than {limit}, it can't be processed")
        share = len(work.span) / len(settings.span)
        seconds = settings.call_seconds + batch * seq * share / (settings.pace or 1.0)
        self._free_at = max(self._free_at, clock()) + seconds
        await asyncio.sleep(self._free_at - clock())
        start = 0
        if isinstance(work.cache, SessionCache):
            start = work.cache.length
            work.cache.roll_back(start + seq)  # forward, without keys and values
        places = torch.arange(start + 1, start + seq + 1, dtype=work.hidden.dtype)
        return work.hidden + _STEP * len(work.span) * places[:, None]
