"""Records read from the DHT, where strangers may have put anything."""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.swarm.wire.records import Announcement

__all__ = ["DhtSource", "join_dht", "look", "read_announcements"]

_LOOK_TIMEOUT = 30.0  # seconds that one look at the DHT may take; its own calls wait 3 s each


class _Reader(MSGPackSerializer):
    """hivemind's decoder, for which a value that cannot be decoded is None.

    hivemind decodes inside its search, which never ends for a key where that raises, nor for the keys after it.
    """

    @classmethod
    def loads(cls, buf: bytes) -> object:
        try:
            return super().loads(buf)
        except Exception:  # noqa: BLE001  # msgpack and the types in it raise anything for what a stranger stored
            return None


async def join_dht(p2p: P2P, initial_peers: Sequence[str]) -> DHTNode:
    """Return a node that asks the DHT and keeps nothing of it. Raises as `DHTNode.create` does."""
    node = await DHTNode.create(p2p=p2p, initial_peers=list(initial_peers), client_mode=True, num_workers=32)
    node.protocol.serializer = _Reader
    return node


class DhtSource:
    """The DHT as a `RecordSource`."""

    def __init__(self, dht: DHTNode):
        self._dht = dht

    async def read(self, blocks: Mapping[str, int]) -> tuple[list[Announcement], int]:
        """Return the records under these keys, and how many entries are none of a server's."""
        return await read_announcements(self._dht, blocks)

    def now(self) -> float:
        """Return hivemind's clock, by which records expire."""
        return float(get_dht_time())


async def read_announcements(dht: DHTNode, blocks: Mapping[str, int]) -> tuple[list[Announcement], int]:
    """Return what the DHT holds under these keys, and how many entries are none of a server's. blocks: by key."""
    found: list[Announcement] = []
    malformed = 0
    for uid, entry in (await look(dht, blocks)).items():
        if entry is None:
            continue
        if not isinstance(entry.value, dict):
            malformed += 1
            continue
        for peer_id, value in entry.value.items():
            # A stranger may have put a plain value in the place of the servers' records, a dictionary, too.
            if not _is_peer_id(peer_id) or not hasattr(value, "expiration_time"):
                malformed += 1
                continue
            found.append(Announcement(blocks[uid], peer_id, value.value, float(value.expiration_time)))
    return found, malformed


async def look(dht: DHTNode, keys: Iterable[str]) -> Mapping[str, Any]:
    """Return what the DHT holds under each key, of those that it answers for in `_LOOK_TIMEOUT`."""
    wanted = list(keys)
    if not wanted:
        return {}
    # An expiration of infinity asks for the newest record there is, not the first one found.
    searches: Mapping[str, asyncio.Future[Any]] = await dht.get_many(
        wanted, math.inf, num_workers=min(32, len(wanted)), return_futures=True
    )
    try:
        found, _ = await asyncio.wait(searches.values(), timeout=_LOOK_TIMEOUT)
    finally:
        for search in searches.values():
            search.cancel()
    return {key: search.result() for key, search in searches.items() if search in found and not search.cancelled()}


def _is_peer_id(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        PeerID.from_base58(text)
    except (ValueError, KeyError):
        return False
    return True
