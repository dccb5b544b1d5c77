"""Blocks at home as a judge: what they compute is right, whatever most servers say."""

import functools
from dataclasses import dataclass

import torch

from petals_eval.errors import ConfigError
from petals_eval.health.compare import Ballot, compare
from petals_eval.health.settings import HealthSettings
from petals_eval.model.blocks import BlockSpan
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.runtime import InThread
from petals_eval.swarm.trust.arbiter import BlocksAtHome
from petals_eval.swarm.trust.tolerance import Kind
from petals_eval.swarm.wire.span import Span

__all__ = ["ReferenceBlocks", "blocks_of", "load_reference_blocks"]


@dataclass(frozen=True, slots=True)
class ReferenceBlocks:
    """Some blocks of one model in this process. prefix: its DHT prefix. hidden_size: of the model."""

    prefix: str
    blocks: BlocksAtHome
    hidden_size: int

    @property
    def span(self) -> Span:
        """The blocks."""
        return Span(self.blocks.start, self.blocks.stop)

    async def findings(self, ballot: Ballot, in_thread: InThread) -> tuple[TrustFinding, ...]:
        """Return the servers of a ballot that compute something else than these blocks. ballot: of a span within them.

        Only those count whose answers the tolerance cannot explain.
        """
        span = ballot.span
        compute = functools.partial(self.blocks.forward, start=span.start, stop=span.stop)
        hidden = await in_thread(compute, ballot.question, None)
        kind = Kind.of(hidden.dtype, None)
        found = []
        for camp in ballot.camps:
            apart = compare(ballot.question, camp.speaker, hidden, kind)
            if apart is not None:
                found += [
                    TrustFinding(server, "wrong", span, apart.difference, apart.excess, witness="home")
                    for server in camp.servers
                ]
        return tuple(found)


def load_reference_blocks(settings: HealthSettings) -> ReferenceBlocks | None:
    """Return the blocks the settings ask for, or None. They are loaded once in a process, however often it looks.

    Raises ConfigError, and ModelError when there is no such model or it has no such blocks.
    """
    if settings.model is None:
        if settings.verify_local is not None:
            raise ConfigError("expected both --model and --verify-local FIRST:LAST: one says where from")
        return None
    if len(settings.models) != 1:
        raise ConfigError("--model is one model, whose servers are held against it: name it with --dht-prefix")
    if settings.verify_local is None:
        return None
    if settings.active_adapter is not None:
        raise ConfigError("blocks at home have no LoRA adapter: leave --active-adapter or --verify-local out")
    blocks = _load(settings.model, *settings.verify_local)
    return ReferenceBlocks(settings.models[0], blocks, blocks.hidden_size)


@functools.lru_cache(maxsize=1)
def blocks_of(model: str) -> int:
    """Return how many blocks a folder or hub name has. Its config is read once in a process. Raises ModelError."""
    checkpoint = Checkpoint.open(model)
    return checkpoint.family.num_blocks(checkpoint.config)


@functools.lru_cache(maxsize=1)
def _load(model: str, start: int, stop: int) -> BlockSpan:
    # float32: the servers' own dtype is theirs to round to
    return BlockSpan.load(model, start, stop, torch.float32)
