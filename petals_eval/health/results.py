"""The report of a look at a swarm's health: typed, frozen, and as JSON.

The JSON is versioned by `schema_version`. A field may be added under the same version; one that is renamed, removed or
given another meaning raises it.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from petals_eval.health.settings import Level
from petals_eval.swarm.wire.span import Span

__all__ = [
    "SCHEMA_VERSION",
    "BootstrapPeer",
    "Finding",
    "HealthReport",
    "ModelHealth",
    "ServerHealth",
    "Traffic",
    "Verdict",
]

SCHEMA_VERSION = 1


class Verdict(StrEnum):
    """See `petals_eval.health.verdict` for the rules. In order: each is worse than those before it."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNKNOWN = "unknown"
    BROKEN = "broken"

    @property
    def badness(self) -> int:
        """How bad it is: its place in the order."""
        return list(Verdict).index(self)

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 degraded, 3 broken; 3 for unknown, too: what nobody knows is not to be relied on."""
        return {Verdict.HEALTHY: 0, Verdict.DEGRADED: 1}.get(self, 3)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    name: stable, from `petals_eval.health.FINDINGS`, which says what it means.
    detail: what was seen, with what a peer said made safe to print.
    implies: the best verdict its server, or its model, can still have.
    level: the probe that found it.
    """

    name: str
    detail: str
    implies: Verdict
    level: Level


@dataclass(frozen=True, slots=True)
class ServerHealth:
    """One server of one model: what it claims, and what was seen of it.

    state: claimed, "online" or "joining". seen: "answers", "unreachable", "silent", "fails" or "not asked".
    start, end: the blocks it claims, end exclusive. dtype, version: claimed; dtype_seen, version_seen: from rpc_info.
    quant_type, adapters, using_relay, throughput (tokens/s), cache_tokens_left: claimed.
    network_rps, forward_rps, inference_rps: claimed tokens/s of its link, and of one block in forward calls and in
    sessions. next_pings: claimed seconds to servers of the next blocks by their peer ids, None for one that did not
    answer; None where it says nothing of them. cache_tokens_seen: from rpc_info.
    round_trip: seconds of an rpc_info over a connection that is there already.
    tokens_per_second: of the canary's call through all blocks of the span: a small call, so mostly the round trip.
    record_age: seconds since the last announcement, reckoned from when the record ends and the announce period.
    probes: by level's name: "passed", "failed", "not asked". compared: blocks that another server computed, too.
    """

    peer_id: str
    public_name: str | None
    start: int
    end: int
    state: str
    seen: str
    version: str | None
    version_seen: str | None
    dtype: str | None
    dtype_seen: str | None
    quant_type: str | None
    adapters: tuple[str, ...]
    using_relay: bool | None
    throughput: float
    network_rps: float | None
    forward_rps: float | None
    inference_rps: float | None
    next_pings: dict[str, float | None] | None
    tokens_per_second: float | None
    cache_tokens_left: int | None
    cache_tokens_seen: int | None
    round_trip: float | None
    record_age: float | None
    probes: dict[str, str]
    compared: int
    findings: tuple[Finding, ...]
    verdict: Verdict

    @property
    def span(self) -> Span:
        """The blocks it claims."""
        return Span(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls to servers, and bytes of their messages without what libp2p adds."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """One model as a look found it.

    level: the probe that was asked for. replicas: by block, servers that may be used as far as they were asked.
    claimed: the same by the records alone. missing: spans (first block, last block + 1) that no such server holds.
    compared: spans whose answers were held against those of another server, or of blocks at home.
    findings: of the model itself. has_route: whether servers that answered hold all blocks between them; None where
    none was asked. route_seconds: of a canary all the way. route_tokens_per_second: of that canary.
    """

    name: str
    repository: str | None
    num_blocks: int
    level: Level
    verdict: Verdict
    why: str
    replicas: tuple[int, ...]
    claimed: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]
    compared: tuple[tuple[int, int], ...]
    has_route: bool | None
    route_seconds: float | None
    route_tokens_per_second: float | None
    servers: tuple[ServerHealth, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def may_have_more_blocks(self) -> bool:
        """Whether nobody says how many blocks it has: `num_blocks` are those that servers announce."""
        return any(finding.name == "blocks-unknown" for finding in self.findings)

    @property
    def covered(self) -> int:
        """Blocks that at least one usable server holds."""
        return sum(count > 0 for count in self.replicas)

    @property
    def thinnest(self) -> tuple[int, int] | None:
        """The first block with the fewest servers, and how many; None for a model without blocks."""
        if not self.replicas:
            return None
        fewest = min(self.replicas)
        return self.replicas.index(fewest), fewest

    @property
    def all_findings(self) -> tuple[tuple["ServerHealth | None", Finding], ...]:
        """What was found of the model itself (with no server) and of its servers."""
        own: list[tuple[ServerHealth | None, Finding]] = [(None, finding) for finding in self.findings]
        return tuple(own + [(server, finding) for server in self.servers for finding in server.findings])


@dataclass(frozen=True, slots=True)
class BootstrapPeer:
    """One address of a bootstrap peer, as it was given.

    state: "reachable", "unreachable" or "not asked". detail: why it is not reachable, or was not asked; None where it
    is. seconds: a connection to it took.
    """

    address: str
    state: str
    detail: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What a look at a swarm found.

    time: when it began, in seconds since the epoch. seconds: how long it took.
    notes: what is worth knowing and is nobody's fault. bootstrap: the addresses it was begun with.
    """

    time: float
    seconds: float
    level: Level
    verdict: Verdict
    models: tuple[ModelHealth, ...]
    traffic: Traffic = field(default_factory=Traffic)
    notes: tuple[str, ...] = ()
    bootstrap: tuple[BootstrapPeer, ...] = ()

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return self.verdict.exit_code

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`; no NaN and no infinity among them."""
        values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **_plain(self)}
        for model, found in zip(self.models, values["models"], strict=True):
            found["blocks_covered"] = model.covered
            thinnest = model.thinnest
            found["thinnest"] = None if thinnest is None else {"block": thinnest[0], "servers": thinnest[1]}
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Level):
        return value.text
    if isinstance(value, StrEnum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value
