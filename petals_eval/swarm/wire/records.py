"""What servers claim in the DHT: records are validated and spans derived from them. No I/O.

Source: the layout of `petals.data_structures.ServerInfo.to_tuple()` in Petals 2.2.0 and 2.3.0.dev2 (PROTOCOL.md
beside this file, section 2).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from operator import attrgetter
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from petals_eval.swarm.wire.span import Span, joined
from petals_eval.text import printable

__all__ = [
    "MODEL_INDEX_KEYS",
    "Announcement",
    "ServerFilter",
    "ServerRecord",
    "ServerState",
    "Snapshot",
    "SpanServer",
    "newest_readable",
    "peer_text",
    "read_snapshot",
]

MODEL_INDEX_KEYS = ("_petals.models", "_drift.models")
"""Keys of the DHT under which servers announce their models, each under its DHT prefix as the subkey.

The first is that of Petals and BloomBee, the second that of DRIFT.
"""


class ServerState(IntEnum):
    """The state a server claims for itself."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


def peer_text(words: str) -> str:
    """Return a peer's words, safe on a terminal and in a file, and no longer than 80 characters."""
    return printable(words, longest=80)


_MAX_PINGS = 128
"""Of one record that are read. Petals asks 20 servers at a time and keeps what it found for five minutes."""


def _readable_pings(value: object) -> object:
    """Keep what can be read. Petals writes infinity for a server that did not answer, which is no reason to do without
    the one that says so; nor is anything else here."""
    if not isinstance(value, dict):
        return None
    found = []
    for peer_id, seconds in value.items():
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds >= 0
        if is_number and isinstance(peer_id, str) and peer_id.isascii() and peer_id.isalnum() and len(peer_id) <= 80:
            found.append((peer_id, float(seconds) if seconds < math.inf else None))
    return tuple(found[:_MAX_PINGS])


_Pings = Annotated[tuple[tuple[str, float | None], ...] | None, BeforeValidator(_readable_pings)]
_Words = Annotated[StrictStr, AfterValidator(peer_text)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[StrictInt, Field(ge=0)]


class ServerRecord(BaseModel):
    """A server's word about itself. Every field of `extra` is optional and unknown ones are ignored.

    throughput: tokens/s through its span. network_rps: tokens/s that its link carries; forward_rps, inference_rps:
    tokens/s of one block, in forward calls and in a session that adds one at a time. Petals measures these three once
    and makes the throughput of them (`petals.server.throughput`). next_pings: peer ids of servers of the next blocks
    with the seconds to each, None for one that did not answer; what cannot be read is left out, however wrong it is.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: ServerState
    throughput: _Rate
    start_block: _Count | None = None
    end_block: _Count | None = None
    public_name: _Words | None = None
    version: _Words | None = None  # of the petals package
    network_rps: _Rate | None = None
    forward_rps: _Rate | None = None
    inference_rps: _Rate | None = None
    adapters: tuple[StrictStr, ...] = ()  # LoRA adapters it can apply
    torch_dtype: _Words | None = None
    quant_type: _Words | None = None
    using_relay: StrictBool | None = None
    cache_tokens_left: _Count | None = None
    next_pings: _Pings = None

    @classmethod
    def from_wire(cls, value: object) -> "ServerRecord":
        """Read `(state, throughput, extra)`. Raises ValueError when it is anything else."""
        if not isinstance(value, (tuple, list)) or len(value) < 2:
            raise ValueError("expected (state, throughput, extra)")
        extra = value[2] if len(value) > 2 else {}
        if not isinstance(extra, dict) or not all(isinstance(key, str) for key in extra):
            raise ValueError("extra is not a dictionary with text keys")
        try:
            return cls(**{**extra, "state": value[0], "throughput": value[1]})
        except ValidationError as error:
            raise ValueError(f"{error.error_count()} invalid fields") from error


@dataclass(frozen=True, slots=True)
class Announcement:
    """A record as found in the DHT: under which block's key, by whom, valid until when (seconds since the epoch)."""

    block: int
    peer_id: str
    value: object
    expiration: float


@dataclass(frozen=True, slots=True)
class SpanServer:
    """A server and the blocks it claims to hold."""

    peer_id: str
    span: Span
    record: ServerRecord


@dataclass(frozen=True, slots=True)
class ServerFilter:
    """Which servers to use. Servers that do not say what is asked for are left out, too.

    active_adapter: a LoRA adapter they must announce. dtype, quant: what they must compute in ("none": unquantised).
    allow, deny: identities, whole or their last letters; an empty `allow` allows everybody.
    """

    active_adapter: str | None = None
    dtype: str | None = None
    quant: str | None = None
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def refusal(self, peer_id: str, record: ServerRecord) -> str | None:
        """Return why a server is left out, or None where it may be used."""
        if self.active_adapter is not None and self.active_adapter not in record.adapters:
            return f"does not announce adapter {self.active_adapter}"
        dtype = (record.torch_dtype or "unknown").removeprefix("torch.")
        if self.dtype is not None and dtype != self.dtype:
            return f"computes in {dtype:.20}, not {self.dtype}"
        if self.quant is not None and record.quant_type != self.quant:
            return f"quantises with {record.quant_type or 'unknown':.20}, not {self.quant}"
        if self.allow and not _named(peer_id, self.allow):
            return "is not among the allowed servers"
        if _named(peer_id, self.deny):
            return "is denied"
        return None


def _named(peer_id: str, names: tuple[str, ...]) -> bool:
    return any(peer_id.endswith(name.lstrip(".")) for name in names)


@dataclass(frozen=True)
class Snapshot:
    """The directory at one moment.

    servers: those that claim to be ONLINE and pass the filter, by peer id.
    left_out: ONLINE servers that do not pass it, each with the reason.
    dropped: the number of malformed records.
    """

    num_blocks: int
    servers: Mapping[str, SpanServer]
    dropped: int = 0
    left_out: Mapping[str, tuple[SpanServer, str]] = field(default_factory=dict)

    @cached_property
    def dtypes(self) -> frozenset[str | None]:
        """The dtypes that the servers announce."""
        return frozenset(server.record.torch_dtype for server in self.servers.values())

    def missing(self, without: frozenset[str] = frozenset()) -> tuple[Span, ...]:
        """Return the blocks that no server holds; servers in `without` (peer ids) do not count."""
        held = [False] * self.num_blocks
        for server in self.servers.values():
            if server.peer_id not in without:
                held[server.span.start : server.span.stop] = [True] * len(server.span)
        return joined(block for block, is_held in enumerate(held) if not is_held)


def read_snapshot(
    announcements: Iterable[Announcement], num_blocks: int, chosen: ServerFilter | None = None
) -> Snapshot:
    """Turn announcements into servers with spans.

    A server that moved has left old records under its old blocks, which live on for minutes: only its newest record
    counts, and the span named there. Records without a span hold the blocks they were found under. Older records than
    a server's newest readable one are not read: on a large swarm reading them all takes ten times as long.
    """
    by_peer: dict[str, list[Announcement]] = {}
    for announcement in announcements:
        by_peer.setdefault(announcement.peer_id, []).append(announcement)

    chosen = chosen or ServerFilter()
    dropped = 0
    servers: dict[str, SpanServer] = {}
    left_out: dict[str, tuple[SpanServer, str]] = {}
    for peer_id, found in by_peer.items():
        record, unreadable = newest_readable(found)
        dropped += unreadable
        if record is None or record.state is not ServerState.ONLINE:
            continue
        span = _span(record, found, num_blocks)
        if not span:
            dropped += 1
            continue
        server = SpanServer(peer_id, span, record)
        reason = chosen.refusal(peer_id, record)
        if reason is None:
            servers[peer_id] = server
        else:
            left_out[peer_id] = (server, reason)
    return Snapshot(num_blocks, servers, dropped, left_out)


def newest_readable(announcements: list[Announcement]) -> tuple[ServerRecord | None, int]:
    """Return the newest of one server's records that can be read, and how many could not be."""
    unreadable = 0
    for announcement in sorted(announcements, key=attrgetter("expiration"), reverse=True):
        try:
            return ServerRecord.from_wire(announcement.value), unreadable
        except ValueError:
            unreadable += 1
    return None, unreadable


def _span(record: ServerRecord, found: list[Announcement], num_blocks: int) -> Span:
    if record.start_block is not None and record.end_block is not None:
        return Span(record.start_block, min(record.end_block, num_blocks))
    first = joined(sorted({announcement.block for announcement in found}))[0]
    return Span(first.start, min(first.stop, num_blocks))
