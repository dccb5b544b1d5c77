"""Blocks at home as a judge: what they compute is right, whatever most servers say."""

import asyncio
import functools
from dataclasses import dataclass

import torch

from petals_eval.errors import ConfigError
from petals_eval.health.canary import Segment
from petals_eval.health.compare import Answered, Votes, agree
from petals_eval.health.settings import HealthSettings
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.trust.arbiter import BlocksAtHome

__all__ = ["Home", "load_home"]


@dataclass(frozen=True, slots=True)
class Home:
    """Blocks first:last of one model in this process, and the hidden size of the model."""

    prefix: str
    blocks: BlocksAtHome
    hidden_size: int

    @property
    def span(self) -> Segment:
        return self.blocks.start, self.blocks.stop

    async def contradicted(self, segment: Segment, ballot: Votes) -> dict[str, float]:
        """Servers that compute something else than the blocks at home, each with how far apart (`compare.agree`).

        Only those count whose answers the tolerance cannot explain. segment: within `span`.
        """
        compute = functools.partial(self.blocks.forward, start=segment[0], stop=segment[1])
        hidden = await asyncio.to_thread(compute, ballot.question, None)
        mine = Answered("home", hidden, None)
        contradicted: dict[str, float] = {}
        for camp in ballot.camps:
            apart, allowed = agree(ballot.question, mine, camp.speaker, ballot.blocks)
            if apart > allowed:
                contradicted |= dict.fromkeys(camp.members, apart)
        return contradicted


def load_home(settings: HealthSettings) -> Home | None:
    """The blocks the settings ask for, or None. Loaded once in a process, however often it looks.

    Raises ConfigError, and ModelError when there is no such model or it has no such blocks.
    """
    if settings.verify_local is None and settings.model is None:
        return None
    if settings.verify_local is None or settings.model is None:
        raise ConfigError("expected both --model and --verify-local FIRST:LAST, or neither: one says where from")
    if len(settings.models) != 1:
        raise ConfigError("--verify-local holds the servers of one model against its blocks: name it with --dht-prefix")
    if settings.active_adapter is not None:
        raise ConfigError("blocks at home have no LoRA adapter: leave --active-adapter or --verify-local out")
    blocks = _load(settings.model, *settings.verify_local)
    return Home(settings.models[0], blocks, blocks.hidden_size)


@functools.lru_cache(maxsize=1)
def _load(model: str, first: int, last: int) -> BlockSpan:
    # float32: the servers' own dtype is theirs to round to
    return BlockSpan.load(model, first, last, torch.float32)
