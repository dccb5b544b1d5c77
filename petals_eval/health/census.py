"""Level `record`: what the DHT says of models and of their servers. A record is a claim."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hivemind.dht.node import DHTNode

from petals_eval.swarm.directory.announced import AnnouncedModel, IndexPolicy, announced_models
from petals_eval.swarm.directory.dht import read_announcements
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import (
    Announcement,
    ServerRecord,
    ServerState,
    SpanServer,
    newest_readable,
)
from petals_eval.swarm.wire.span import Span, joined

__all__ = [
    "AnnouncedModel",
    "Census",
    "ServerClaim",
    "announced_models",
    "claims_in",
    "count_blocks",
    "record_age",
    "take_census",
]


_BLOCKS_AT_ONCE = 64
"""Blocks that are looked up together where nobody says how many there are."""


@dataclass(frozen=True, slots=True)
class ServerClaim:
    """What one server says of itself.

    server: with the span it names, which may reach beyond the model or be empty. remaining: seconds until its newest
    record ends. found: blocks under which that record lies; left: blocks under which older ones still lie.
    """

    server: SpanServer
    remaining: float
    found: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Census:
    """The servers that claim to serve a model, without those that have said goodbye.

    malformed: how many records cannot be read.
    """

    model: AnnouncedModel
    claims: tuple[ServerClaim, ...]
    malformed: int = 0


async def take_census(dht: DHTNode, model: AnnouncedModel, now: float) -> Census:
    """Read the records of every block. now: on the DHT's clock (`get_dht_time`)."""
    uids = {wire.block_uid(model.prefix, block): block for block in range(model.num_blocks)}
    announcements, malformed = await read_announcements(dht, uids)
    claims, dropped = claims_in(announcements, now)
    return Census(model, claims, malformed + dropped)


async def count_blocks(dht: DHTNode, prefix: str) -> int:
    """Return how many blocks a model has whose name nobody announces: as far as there are records."""
    step = _BLOCKS_AT_ONCE
    for start in range(0, IndexPolicy.max_blocks, step):
        uids = {wire.block_uid(prefix, block): block for block in range(start, start + step)}
        found, _ = await read_announcements(dht, uids)
        if len({each.block for each in found}) < step:
            return max((each.block + 1 for each in found), default=start)
    return IndexPolicy.max_blocks


def claims_in(announcements: Iterable[Announcement], now: float) -> tuple[tuple[ServerClaim, ...], int]:
    """Return a claim for each server that is ONLINE or JOINING, by its newest record, and how many records are none."""
    by_peer: dict[str, list[Announcement]] = {}
    for each in announcements:
        if each.expiration > now:
            by_peer.setdefault(each.peer_id, []).append(each)
    claims, dropped = [], 0
    for peer_id, found in by_peer.items():
        record, unreadable = newest_readable(found)
        dropped += unreadable
        if record is None or record.state is ServerState.OFFLINE:
            continue
        ends = max(each.expiration for each in found)
        # The records of one announcement are stored together and end at the same moment; a second allows for rounding.
        current = sorted(each.block for each in found if each.expiration > ends - 1)
        older = tuple(sorted(each.block for each in found if each.expiration <= ends - 1))
        server = SpanServer(peer_id, _span(record, current), record)
        claims.append(ServerClaim(server, ends - now, tuple(current), older))
    return tuple(sorted(claims, key=lambda claim: (claim.server.span, claim.server.peer_id))), dropped


def _span(record: ServerRecord, blocks: list[int]) -> Span:
    if record.start_block is not None and record.end_block is not None:
        return Span(record.start_block, record.end_block)
    return joined(blocks)[0]


def record_age(remaining: float, announce_period: float) -> float | None:
    """Return the seconds since a server announced itself: records live for two periods.

    None where its period must be longer than `announce_period`.
    """
    age = 2 * announce_period - remaining
    return age if age > -1 and math.isfinite(age) else None
