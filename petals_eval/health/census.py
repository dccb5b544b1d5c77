"""Level `record`: what the DHT says of models and of their servers. A record is a claim."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hivemind.dht.node import DHTNode

from petals_eval.swarm.directory.dht import LOOK_TIMEOUT, read_announcements
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import MODELS_KEY, Announcement, ServerRecord, ServerState, newest_readable
from petals_eval.text import printable

__all__ = [
    "AnnouncedModel",
    "Census",
    "Claim",
    "age",
    "announced_models",
    "claims_in",
    "count_blocks",
    "read_models",
    "take_census",
]

MOST_BLOCKS = 1000
"""Of a model: a stranger may announce any number, and each block is a key to ask the DHT for."""
_MOST_MODELS = 100
_LONGEST_NAME = 200  # characters
_STEP = 64  # blocks looked at together where nobody says how many there are


@dataclass(frozen=True, slots=True)
class AnnouncedModel:
    """A DHT prefix with what its servers say of the model."""

    prefix: str
    num_blocks: int
    repository: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What one server says of itself. remaining: seconds until its newest record ends.

    start, end: the span it names, not cut to the model. found: blocks under which its newest record lies; left: blocks
    under which older ones still lie.
    """

    peer_id: str
    start: int
    end: int
    record: ServerRecord
    remaining: float
    found: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Census:
    """Everybody who claims to serve a model, but for those that have said goodbye. malformed: records of nobody."""

    model: AnnouncedModel
    claims: tuple[Claim, ...]
    malformed: int = 0


async def announced_models(dht: DHTNode) -> tuple[list[AnnouncedModel], int]:
    """Every model that servers announce, by name, and how many entries cannot be read.

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
    """Entries `{prefix: {"num_blocks": int, "repository": url or None}}`, and how many are none."""
    models: list[AnnouncedModel] = []
    malformed = 0
    for prefix, value in entries.items():
        num_blocks = value.get("num_blocks") if isinstance(value, dict) else None
        if (
            not isinstance(prefix, str)
            or not 0 < len(prefix) <= _LONGEST_NAME
            or not isinstance(num_blocks, int)
            or isinstance(num_blocks, bool)
            or not 0 < num_blocks <= MOST_BLOCKS
            or len(models) >= _MOST_MODELS
        ):
            malformed += 1
            continue
        url = value.get("repository")
        repository = printable(url, longest=_LONGEST_NAME) if isinstance(url, str) else None
        models.append(AnnouncedModel(prefix, num_blocks, repository))
    return sorted(models, key=lambda model: model.prefix), malformed


async def take_census(dht: DHTNode, model: AnnouncedModel, now: float) -> Census:
    """Read the records of every block. now: on the DHT's clock (`get_dht_time`)."""
    uids = {wire.block_uid(model.prefix, block): block for block in range(model.num_blocks)}
    announcements, malformed = await read_announcements(dht, uids)
    claims, dropped = claims_in(announcements, now)
    return Census(model, claims, malformed + dropped)


async def count_blocks(dht: DHTNode, prefix: str) -> int:
    """How many blocks a model has whose name nobody announces: as far as there are records."""
    for start in range(0, MOST_BLOCKS, _STEP):
        uids = {wire.block_uid(prefix, block): block for block in range(start, start + _STEP)}
        found, _ = await read_announcements(dht, uids)
        if len({each.block for each in found}) < _STEP:
            return max((each.block + 1 for each in found), default=start)
    return MOST_BLOCKS


def claims_in(announcements: Iterable[Announcement], now: float) -> tuple[tuple[Claim, ...], int]:
    """One claim for each server that is ONLINE or JOINING, by its newest record, and how many records are none."""
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
        start, end = _span(record, current)
        older = tuple(sorted(each.block for each in found if each.expiration <= ends - 1))
        claims.append(Claim(peer_id, start, end, record, ends - now, tuple(current), older))
    return tuple(sorted(claims, key=lambda claim: (claim.start, claim.end, claim.peer_id))), dropped


def _span(record: ServerRecord, blocks: list[int]) -> tuple[int, int]:
    if record.start_block is not None and record.end_block is not None:
        return record.start_block, record.end_block
    end = blocks[0] + 1
    while end in blocks:
        end += 1
    return blocks[0], end


def age(remaining: float, announce_period: float) -> float | None:
    """Seconds since a server announced itself: records live for two periods. None where its period must be longer."""
    found = 2 * announce_period - remaining
    return found if found > -1 and math.isfinite(found) else None
