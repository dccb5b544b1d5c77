"""What servers claim in the DHT: records validated, spans derived. No I/O.

Source: the layout of `petals.data_structures.ServerInfo.to_tuple()` in Petals 2.2.0 and 2.3.0.dev2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from operator import attrgetter
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from petals_eval.text import printable

__all__ = [
    "Announcement",
    "Choice",
    "ServerRecord",
    "ServerState",
    "Snapshot",
    "SpanServer",
    "newest_readable",
    "read_snapshot",
    "shown",
]


class ServerState(IntEnum):
    """The state a server claims for itself."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


def shown(words: str) -> str:
    """A stranger's words, safe on a terminal and in a file: short, and without what moves the cursor or hides."""
    return printable(words, longest=_LONGEST_WORDS)


_LONGEST_WORDS = 80  # characters
_Words = Annotated[StrictStr, AfterValidator(shown)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[StrictInt, Field(ge=0)]


class ServerRecord(BaseModel):
    """One server's word about itself. Every field of `extra` is optional and unknown ones are ignored.

    So is `next_pings`, the seconds to servers of the next blocks: nothing here needs them, and Petals writes infinity
    for one that did not answer in time, which is no reason to do without the server that says so.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: ServerState
    throughput: _Rate  # requests per second, as measured or set by the server
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

    @classmethod
    def from_wire(cls, value: object) -> "ServerRecord":
        """Read `(state, throughput, extra)`; raises ValueError when it is anything else."""
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
    """A server and the blocks start:end it claims to hold."""

    peer_id: str
    start: int
    end: int
    record: ServerRecord


@dataclass(frozen=True, slots=True)
class Choice:
    """Whom to use. Servers that do not say what is asked for are left out, too.

    active_adapter: a LoRA adapter they must announce. dtype, quant: what they must compute in ("none": unquantised).
    allow, deny: identities, whole or their last letters; an empty `allow` allows everybody.
    """

    active_adapter: str | None = None
    dtype: str | None = None
    quant: str | None = None
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def refusal(self, peer_id: str, record: ServerRecord) -> str | None:
        """Why a server is left out; None where it may be used."""
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

    servers: those that claim to be ONLINE and are chosen, by peer id.
    left_out: ONLINE servers that are not chosen, each with the reason.
    dropped: malformed records.
    """

    num_blocks: int
    servers: Mapping[str, SpanServer]
    dropped: int = 0
    left_out: Mapping[str, tuple[SpanServer, str]] = field(default_factory=dict)

    @cached_property
    def dtypes(self) -> frozenset[str | None]:
        """Those that the servers announce."""
        return frozenset(server.record.torch_dtype for server in self.servers.values())

    def missing(self, without: frozenset[str] = frozenset()) -> tuple[tuple[int, int], ...]:
        """Blocks no server holds, as (first, last + 1) spans; servers in `without` do not count."""
        held = [False] * self.num_blocks
        for server in self.servers.values():
            if server.peer_id not in without:
                held[server.start : server.end] = [True] * (server.end - server.start)
        spans: list[tuple[int, int]] = []
        for block in (index for index, is_held in enumerate(held) if not is_held):
            if spans and spans[-1][1] == block:
                spans[-1] = (spans[-1][0], block + 1)
            else:
                spans.append((block, block + 1))
        return tuple(spans)


def read_snapshot(announcements: Iterable[Announcement], num_blocks: int, choice: Choice | None = None) -> Snapshot:
    """Turn announcements into servers with spans.

    A server that moved has left old records under its old blocks, which live on for minutes: only its newest record
    counts, and the span named there. Records without a span hold the blocks they were found under. Older records than
    a server's newest readable one are not read: on a large swarm reading them all takes ten times as long.
    """
    by_peer: dict[str, list[Announcement]] = {}
    for announcement in announcements:
        by_peer.setdefault(announcement.peer_id, []).append(announcement)

    choice = choice or Choice()
    dropped = 0
    servers: dict[str, SpanServer] = {}
    left_out: dict[str, tuple[SpanServer, str]] = {}
    for peer_id, found in by_peer.items():
        record, unreadable = newest_readable(found)
        dropped += unreadable
        if record is None or record.state is not ServerState.ONLINE:
            continue
        start, end = _span(record, found)
        end = min(end, num_blocks)
        if start >= end:
            dropped += 1
            continue
        server = SpanServer(peer_id, start, end, record)
        reason = choice.refusal(peer_id, record)
        if reason is None:
            servers[peer_id] = server
        else:
            left_out[peer_id] = (server, reason)
    return Snapshot(num_blocks, servers, dropped, left_out)


def newest_readable(announcements: list[Announcement]) -> tuple[ServerRecord | None, int]:
    """The newest of one server's records that can be read, and how many could not."""
    dropped = 0
    newest = max(announcements, key=_expiration)  # nearly always it will do, and the rest need not be sorted
    try:
        return ServerRecord.from_wire(newest.value), dropped
    except ValueError:
        dropped += 1
    for announcement in sorted(announcements, key=_expiration, reverse=True):
        if announcement is not newest:
            try:
                return ServerRecord.from_wire(announcement.value), dropped
            except ValueError:
                dropped += 1
    return None, dropped


_expiration = attrgetter("expiration")


def _span(record: ServerRecord, found: list[Announcement]) -> tuple[int, int]:
    if record.start_block is not None and record.end_block is not None:
        return record.start_block, record.end_block
    blocks = sorted({announcement.block for announcement in found})
    end = blocks[0] + 1
    while end in blocks:
        end += 1
    return blocks[0], end
