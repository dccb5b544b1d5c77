"""Runs over a fake swarm whose answers are audited, and what is held against its servers in the end."""

from collections.abc import Sequence
from random import Random

import torch

from petals_eval.config import SwarmSettings
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.pipeline import ServedHop
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.wire.records import SpanServer
from tests.support.fake_swarm import FakeCall, FakeDirectory, FakeTransport, ResidualBlocks, pipeline, run_all, server
from tests.support.tensors import hidden_states

SIZE = 32
BLOCKS = 4
SHARE = SwarmSettings.model_fields["verify"].default


def float32(name: str, start: int = 0, stop: int = BLOCKS) -> SpanServer:
    return server(name, start, stop, torch_dtype="float32")


def bfloat16(name: str, start: int = 0, stop: int = BLOCKS) -> SpanServer:
    return server(name, start, stop, torch_dtype="bfloat16")


def states(seed: int) -> torch.Tensor:
    """A micro-batch."""
    return hidden_states(2, 8, SIZE, seed=seed)


class PassesProbes(FakeTransport):
    """Servers that answer the determinism guard's probes well whatever they do otherwise: an audit must find them."""

    async def answer(
        self, hop: Hop, activations: Activations, *, is_probe: bool = False, is_step: bool = False
    ) -> Answer:
        if not is_probe:
            return await super().answer(hop, activations, is_step=is_step)
        self.probes.append(FakeCall(hop.peer_id, hop.span, tuple(activations.hidden.shape)))
        await self._reach(hop.peer_id)
        return Answer(activations.hidden, self.seconds, 8, 8)


class AuditedRun:
    """A pipeline over servers that audits their answers; `go` sends micro-batches through it, and settles."""

    def __init__(
        self, *servers: SpanServer, transport: FakeTransport | None = None, seed: int = 0, **values: object
    ) -> None:
        """values: of the settings."""
        self.blocks = ResidualBlocks(SIZE, BLOCKS)
        self.transport = transport or PassesProbes(seconds=0)
        self.transport.blocks = self.blocks
        self.directory = FakeDirectory(BLOCKS, *servers)
        chosen = {"deadline": 2, "min_backoff": 0.001, "verify": SHARE, **values}
        self.pipe = pipeline(self.directory, self.transport, runtime=Runtime(random=Random(seed)), **chosen)
        self.peers = self.pipe.peers

    def hold(self, *servers: SpanServer) -> None:
        """Let these be the servers of the swarm from now on."""
        self.directory.snapshot = FakeDirectory(BLOCKS, *servers).snapshot

    def go(
        self, count: int = 20, *, prompts: torch.Tensor | None = None
    ) -> Sequence[tuple[torch.Tensor, tuple[ServedHop, ...]]]:
        """Return the answers to so many micro-batches, in order, and who computed them."""
        return run_all(self.pipe, [states(seed) for seed in range(count)], at_once=4, prompts=prompts, stop=BLOCKS)

    @property
    def statuses(self) -> dict[str, str]:
        """What is held against servers, by peer id."""
        return {finding.server.peer_id: finding.status for finding in self.pipe.status().findings}

    @property
    def notices(self) -> tuple[str, ...]:
        return self.pipe.status().notices
