"""The span of one server with all that its calls and sessions have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from petals_eval.local_swarm.faults.injector import FaultInjector
from petals_eval.local_swarm.server.cache_budget import CacheBudget
from petals_eval.local_swarm.server.messages import decoded, encoded, output_codes
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.local_swarm.work import Compute, ComputeGradients
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.wire.messages import block_uid
from petals_eval.swarm.wire.span import Span

__all__ = ["ServedSpan"]


@dataclass(frozen=True, eq=False)
class ServedSpan:
    """A server's blocks, how they are computed, and what their calls share.

    compute: applies blocks to hidden states, behind the server's middleware.
    compute_gradients: the way back through them, which no middleware sees.
    budget: the room for the caches of sessions.
    """

    settings: ServerSettings
    blocks: BlockSpan
    compute: Compute
    compute_gradients: ComputeGradients
    budget: CacheBudget
    faults: FaultInjector

    @cached_property
    def uids(self) -> dict[str, int]:
        """The blocks by their uids."""
        span = self.settings.span
        return {block_uid(self.settings.dht_prefix, block): block for block in range(span.start, span.stop)}

    def requested(self, uid: str) -> Span:
        """Return the blocks that a chain of uids names.

        Raises RuntimeError for blocks that this server does not hold, ValueError for ones that are not consecutive.
        """
        chain = (uid or "").split(" ")
        for one in chain:
            if one not in self.uids:
                raise RuntimeError(f"Remote peer does not serve {one}")
        blocks = [self.uids[one] for one in chain]
        span = Span(blocks[0], blocks[0] + len(blocks))
        if blocks != list(range(span.start, span.stop)):
            raise ValueError(f"expected consecutive blocks, found {uid}")
        return span

    def active_adapter(self, metadata: dict[str, Any]) -> str:
        """Return the LoRA adapter that a call names; raises KeyError for one that this server did not announce."""
        name = metadata.get("active_adapter") or ""
        if name and name not in self.settings.adapters:
            raise KeyError(f"adapter {name} not found")
        return name

    def read(self, messages: Sequence[runtime_pb2.Tensor]) -> list[torch.Tensor]:
        """Return the tensors of a request. Raises what hivemind raises for codes that it cannot read."""
        self.faults.check_codes(messages)
        return [decoded(message, self.settings) for message in messages]

    async def answer(self, output: torch.Tensor, metadata: dict[str, Any], remote: str) -> runtime_pb2.Tensor:
        """Return hidden states as they are sent to a client (peer id, base58), with the faults that hit the message."""
        (code,) = output_codes(metadata, 1)
        message = encoded(output.to(self.blocks.dtype), code, self.settings)
        return await self.faults.tampered(message, remote)

    def answer_gradients(self, gradients: Sequence[torch.Tensor], metadata: dict[str, Any]) -> list[runtime_pb2.Tensor]:
        """Return gradients as they are sent to a client. No fault hits them."""
        codes = output_codes(metadata, len(gradients))
        return [encoded(each, code, self.settings) for each, code in zip(gradients, codes, strict=True)]
