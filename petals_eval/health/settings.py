"""Every setting of a look at a swarm's health, with its default and its unit."""

from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from petals_eval.config import (
    BUDGET,
    OUTPUT,
    PROBES,
    SWARM,
    Blocks,
    ModelOnSwarm,
    Names,
    Positive,
    RunSettings,
    Seconds,
    Settings,
    SomePeers,
    SwarmSettings,
    option,
    same_as,
)

__all__ = ["HealthSettings", "Level", "LookSettings"]


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
        """Its name as people write it."""
        return self.name.lower()


def _level(value: object) -> object:
    names = {level.text: level for level in Level}
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return names[value]
    return value


def _networks(value: object) -> object:
    """Read networks as people write them, such as 10.1.0.0/16."""
    try:
        return tuple(ip_network(each) for each in ([value] if isinstance(value, str) else value))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected networks such as 10.1.0.0/16 or fd00::/8 ({error})") from error


Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)]


class ProbeSettings(Settings, heading=PROBES):
    """How far servers are asked, and what they are held against."""

    level: Annotated[Level, BeforeValidator(_level)] = option(
        Level.ROUTE, "How far servers are asked: record, info, forward or route.", "LEVEL"
    )
    active_adapter: str | None = option(None, "LoRA adapter that every server should have.", "NAME")
    model: str | None = option(
        None, "Hub name or folder: it says how many blocks there are, and has the weights for --verify-local.", "NAME"
    )
    verify_local: Blocks | None = same_as(RunSettings, "verify_local", heading=PROBES)
    min_replicas: Positive = option(1, "Servers each block should have; fewer is a finding.")
    announce_period: Seconds = option(120.0, "Time between a server's announcements; the default is Petals'.")
    hidden_size: Positive | None = option(None, "Hidden size of the canary.", unset="as the servers say")


class BudgetSettings(Settings, heading=BUDGET):
    """What a look may cost."""

    canary_positions: Annotated[int, Field(gt=0, le=256)] = option(
        16, "Positions of a row of the canary; small hidden sizes get more rows."
    )
    concurrency: Annotated[int, Field(gt=0, le=1000)] = option(64, "Servers asked at once.")
    time_limit: Seconds = option(60.0, "Time for a whole look; what is not asked by then is unknown.")
    connect_timeout: Seconds = same_as(SwarmSettings, "connect_timeout", heading=BUDGET)
    call_timeout: Seconds = option(30.0, "Time for one canary.")
    startup_timeout: Seconds = same_as(SwarmSettings, "startup_timeout")


class HealthSettings(ProbeSettings, BudgetSettings, heading=SWARM):
    """What to look at, how far, and what it may cost."""

    initial_peers: SomePeers = same_as(SwarmSettings, "initial_peers", heading=SWARM)
    models: Names = option(
        (), "A model to look at; several times for several.", "NAME...", unset="all announced", flag="--dht-prefix"
    )
    index_keys: Names = same_as(SwarmSettings, "index_keys", heading=SWARM)
    num_blocks: Annotated[int, Field(gt=0, le=1000)] | None = option(
        None, "Blocks of these models.", unset="as announced"
    )

    def for_swarm(self) -> SwarmSettings:
        """Return the settings of the connection for a look."""
        return SwarmSettings(
            initial_peers=self.initial_peers,
            active_adapter=self.active_adapter,
            index_keys=self.index_keys,
            startup_timeout=self.startup_timeout,
            connect_timeout=self.connect_timeout,
            request_timeout=self.call_timeout,
            deadline=self.time_limit,
            verify=0.0,  # replicas are held against each other by the level before the route
        )


class LookSettings(Settings, heading=OUTPUT):
    """How often a swarm is looked at, and where what was found is shown."""

    public_swarm: bool = same_as(ModelOnSwarm, "public_swarm")
    json_output: bool = option(False, "Print the report as JSON alone on stdout.", flag="--json", alias="json")
    html: Path | None = option(None, "Write the report as one HTML page.", "FILE")
    watch: bool = option(False, "Look again and again; show what changes.")
    serve: str | None = option(None, "Serve the page and metrics; without a host on this machine alone.", "[HOST]:PORT")
    every: float = option(60.0, "Time between two looks of --watch and --serve.")
    is_reachable: bool = option(False, "With --serve, tell Petals servers that ask whether others can reach them.")
    dial_networks: Networks = option(
        (), "Networks beside the public ones where --is-reachable may dial.", "CIDR...", unset="none"
    )
    history: Path | None = option(None, "SQLite file of --serve.", "FILE", unset="in memory")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.serve is not None and (self.watch or self.json_output or self.html is not None):
            raise ValueError(
                "--serve shows the report on its page and under /api/v1/state: leave --watch, --json, --html out"
            )
        if self.is_reachable and self.serve is None:
            raise ValueError("--is-reachable is answered by --serve: add --serve :9090, or leave it out")
        if self.dial_networks and not self.is_reachable:
            raise ValueError("--dial-networks is for --is-reachable: add it, or leave both out")
        if self.history is not None and self.serve is None:
            raise ValueError("--history is kept by --serve: add --serve :9090, or leave it out")
        if self.html is not None and not self.html.absolute().parent.is_dir():
            raise ValueError(f"--html: expected a file in a folder that is there, found {self.html}")
        if not self.every > 0:
            raise ValueError(f"--every: expected seconds above 0, found {self.every:g}")
        return self
