"""Every setting of a look at a swarm's health, with its default and its unit."""

from enum import IntEnum
from typing import Annotated

from pydantic import BeforeValidator, Field

from petals_eval.config import Blocks, Names, Seconds, Settings, SomePeers

__all__ = ["HealthSettings", "Level"]


class Level(IntEnum):
    """How far servers are asked; each level includes those before it.

    record: only what the DHT says. info: does a server answer, and does it say what its record says?
    forward: do its blocks compute, the same twice, and the same as other servers' blocks? route: and all the way?
    """

    RECORD = 0
    INFO = 1
    FORWARD = 2
    ROUTE = 3

    @property
    def text(self) -> str:
        return self.name.lower()


def _level(value: object) -> object:
    names = {level.text: level for level in Level}
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return names[value]
    return value


class HealthSettings(Settings):
    """What to look at, how far, and what it may cost."""

    initial_peers: SomePeers  # bootstrap peers; one that answers is enough

    models: Names = ()  # DHT prefixes; none: every announced model
    level: Annotated[Level, BeforeValidator(_level)] = Level.ROUTE
    num_blocks: int | None = Field(default=None, gt=0, le=1000)  # of the models named; None: as announced
    hidden_size: int | None = Field(default=None, gt=0)  # of the canary; None: as the servers' own descriptors say
    active_adapter: str | None = None  # LoRA adapter every server should announce and compute with
    model: str | None = None  # hub name or local folder of the blocks at home
    verify_local: Blocks | None = None  # blocks first:last of it to load here, and to hold their servers against
    min_replicas: int = Field(default=1, gt=0)  # servers a block should have; fewer is a finding
    announce_period: Seconds = 120.0  # seconds between a server's announcements: Petals' default

    concurrency: int = Field(default=64, gt=0, le=1000)  # servers asked at once
    canary_positions: int = Field(default=16, gt=0, le=256)  # of a row of the canary; small hidden sizes get more rows
    time_limit: Seconds = 60.0  # seconds for the whole look; what is not asked by then is unknown
    connect_timeout: Seconds = 10.0  # seconds for a server's answer to rpc_info, connecting included
    call_timeout: Seconds = 30.0  # seconds for a server's answer to a canary
    startup_timeout: Seconds = 30.0  # seconds until the libp2p daemon and the DHT node must be up
