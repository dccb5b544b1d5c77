"""The directory: who claims to serve what, read from the DHT and kept fresh."""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.config import SwarmSettings
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import Announcement, Choice, Snapshot, read_snapshot

__all__ = ["LOOK_TIMEOUT", "Directory", "read_announcements"]

_log = logging.getLogger(__name__)

LOOK_TIMEOUT = 30.0
"""Seconds one look at the DHT may take; its own calls wait 3 s each."""


class Directory:
    """Snapshots of the records of one model. Used from the connection's event loop only."""

    def __init__(self, dht: DHTNode, dht_prefix: str, num_blocks: int, settings: SwarmSettings):
        self._dht = dht
        self._uids = {wire.block_uid(dht_prefix, block): block for block in range(num_blocks)}
        self._num_blocks = num_blocks
        self._settings = settings
        self._choice = Choice(
            active_adapter=settings.active_adapter,
            dtype=settings.require_dtype,
            quant=settings.require_quant,
            allow=settings.allow_servers,
            deny=settings.deny_servers,
        )
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf
        self._is_used = True
        self._announcements: dict[tuple[int, str], Announcement] = {}  # the newest of each block and peer
        self.dht_prefix = dht_prefix
        self.snapshot = Snapshot(num_blocks, {})

    async def refresh(self, *, older_than: float = 0.0) -> Snapshot:
        """Read the DHT, unless the last look is less than `older_than` seconds old; callers share one look."""
        if time.monotonic() - self._refreshed_at >= older_than:
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.create_task(self._read())
            await asyncio.shield(self._refreshing)
        return self.snapshot

    async def keep_fresh(self) -> None:
        """Refresh every update_period seconds until cancelled, as long as somebody uses it: a connection that is kept
        between the epochs of a training asks nothing of anybody."""
        while True:
            await asyncio.sleep(self._settings.update_period)
            if self._is_used:
                self._is_used = False
                await self._refresh_if_it_can(self._settings.update_period / 2)

    async def use(self) -> None:
        """Keep the snapshot fresh from now on, and refresh it first where nobody has used it for long."""
        self._is_used = True
        longest = 2 * self._settings.update_period
        if time.monotonic() - self._refreshed_at > longest:
            await self._refresh_if_it_can(longest)

    async def _refresh_if_it_can(self, older_than: float) -> None:
        try:
            await self.refresh(older_than=older_than)
        except Exception:  # noqa: BLE001  # see below
            # hivemind decodes strangers' values in there; whatever that raises, the last look holds.
            _log.debug("the directory could not be read", exc_info=True)

    async def _read(self) -> None:
        """Take in what the DHT says now. A record holds until it expires, also when the DHT cannot be asked: the nodes
        that kept it may be gone while its server is well."""
        now = get_dht_time()
        known = {key: record for key, record in self._announcements.items() if record.expiration > now}
        announcements, malformed = await read_announcements(self._dht, self._uids)
        for found in announcements:
            before = known.get((found.block, found.peer_id))
            if before is None or before.expiration <= found.expiration:
                known[found.block, found.peer_id] = found
        self._announcements = known
        snapshot = read_snapshot(known.values(), self._num_blocks, self._choice)
        self.snapshot = replace(snapshot, dropped=snapshot.dropped + malformed)
        self._refreshed_at = time.monotonic()


async def read_announcements(dht: DHTNode, uids: Mapping[str, int]) -> tuple[list[Announcement], int]:
    """What the DHT holds under these keys, and how many entries are none of a server's.

    uids: block by key.
    """
    found: list[Announcement] = []
    malformed = 0
    for uid, entry in (await _look(dht, uids)).items():
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
            found.append(Announcement(uids[uid], peer_id, value.value, float(value.expiration_time)))
    return found, malformed


async def _look(dht: DHTNode, uids: Iterable[str]) -> Mapping[str, Any]:
    """What the DHT holds under each key; nothing when it does not answer."""
    keys = list(uids)
    try:
        async with asyncio.timeout(LOOK_TIMEOUT):
            # An expiration of infinity asks for the newest record there is, not the first one found.
            return await dht.get_many(keys, math.inf, num_workers=min(32, len(keys)))
    except TimeoutError:
        return {}


def _is_peer_id(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        PeerID.from_base58(text)
    except (ValueError, KeyError):
        return False
    return True
