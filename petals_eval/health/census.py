"""Level `record`: what the DHT says of models and of their servers. A record is a claim."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hivemind.dht.node import DHTNode

from petals_eval.swarm.directory.dht import LOOK_TIMEOUT, read_announcements
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import (
    MODELS_KEY,
    Announcement,
    ServerRecord,
    ServerState,
    SpanServer,
    newest_readable,
)
from petals_eval.swarm.wire.span import Span, joined
from petals_eval.text import printable

__all__ = [
    "AnnouncedModel",
    "Census",
    "ServerClaim",
    "announced_models",
    "claims_in",
    "count_blocks",
    "read_models",
    "record_age",
    "take_census",
]


@dataclass(frozen=True)
class CensusPolicy:
    """What is believed of announcements at most: a stranger may announce anything.

    max_blocks: of a model; each is a key to ask the DHT for. max_models: of a swarm.
    max_name_length: characters of a model's name, and of the address of its repository.
    blocks_at_once: that are looked up together where nobody says how many there are.
    """

    max_blocks: int = 1000
    max_models: int = 100
    max_name_length: int = 200
    blocks_at_once: int = 64


@dataclass(frozen=True, slots=True)
class AnnouncedModel:
    """A DHT prefix with what its servers say of the model."""

    prefix: str
    num_blocks: int
    repository: str | None


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


async def announced_models(dht: DHTNode) -> tuple[list[AnnouncedModel], int]:
    """Return every model that servers announce, by name, and how many entries cannot be read.

    Models whose prefix begins with an underscore are private: servers do not announce them.
    """
    try:
        async with asyncio.timeout(LOOK_TIMEOUT):
            entry = await dht.get(MODELS_KEY, latest=True)
    except TimeoutError:
        return [], 0
    if entry is None or not isinstance(entry.value, dict):
        return [], int(entry is not None)
    return read_models({prefix: getattr(value, "value", None) for prefix, value in entry.value.items()})


def read_models(entries: Mapping[Any, Any]) -> tuple[list[AnnouncedModel], int]:
    """Read entries `{prefix: {"num_blocks": int, "repository": url or None}}`; return how many are none, too."""
    models: list[AnnouncedModel] = []
    malformed = 0
    for prefix, value in entries.items():
        num_blocks = value.get("num_blocks") if isinstance(value, dict) else None
        if (
            not isinstance(prefix, str)
            or not 0 < len(prefix) <= CensusPolicy.max_name_length
            or not isinstance(num_blocks, int)
            or isinstance(num_blocks, bool)
            or not 0 < num_blocks <= CensusPolicy.max_blocks
            or len(models) >= CensusPolicy.max_models
        ):
            malformed += 1
            continue
        url = value.get("repository")
        repository = printable(url, longest=CensusPolicy.max_name_length) if isinstance(url, str) else None
        models.append(AnnouncedModel(prefix, num_blocks, repository))
    return sorted(models, key=lambda model: model.prefix), malformed


async def take_census(dht: DHTNode, model: AnnouncedModel, now: float) -> Census:
    """Read the records of every block. now: on the DHT's clock (`get_dht_time`)."""
    uids = {wire.block_uid(model.prefix, block): block for block in range(model.num_blocks)}
    announcements, malformed = await read_announcements(dht, uids)
    claims, dropped = claims_in(announcements, now)
    return Census(model, claims, malformed + dropped)


async def count_blocks(dht: DHTNode, prefix: str) -> int:
    """Return how many blocks a model has whose name nobody announces: as far as there are records."""
    step = CensusPolicy.blocks_at_once
    for start in range(0, CensusPolicy.max_blocks, step):
        uids = {wire.block_uid(prefix, block): block for block in range(start, start + step)}
        found, _ = await read_announcements(dht, uids)
        if len({each.block for each in found}) < step:
            return max((each.block + 1 for each in found), default=start)
    return CensusPolicy.max_blocks


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
