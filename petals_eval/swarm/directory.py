"""The directory: who claims to serve what, read from the DHT and kept fresh."""

import asyncio
import math
import time
from dataclasses import replace

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID

from petals_eval.config import SwarmSettings
from petals_eval.swarm import wire
from petals_eval.swarm.records import Announcement, Choice, Snapshot, read_snapshot

__all__ = ["Directory"]


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
        """Refresh every update_period seconds until cancelled."""
        while True:
            await asyncio.sleep(self._settings.update_period)
            await self.refresh(older_than=self._settings.update_period / 2)

    async def _read(self) -> None:
        # An expiration of infinity asks for the newest record there is, not the first one found.
        found = await self._dht.get_many(list(self._uids), math.inf, num_workers=min(32, len(self._uids)))
        announcements = []
        malformed = 0
        for uid, entry in found.items():
            if entry is None:
                continue
            if not isinstance(entry.value, dict):
                malformed += 1
                continue
            for peer_id, value in entry.value.items():
                if not _is_peer_id(peer_id):
                    malformed += 1
                    continue
                announcements.append(Announcement(self._uids[uid], peer_id, value.value, float(value.expiration_time)))
        snapshot = read_snapshot(announcements, self._num_blocks, self._choice)
        self.snapshot = replace(snapshot, dropped=snapshot.dropped + malformed)
        self._refreshed_at = time.monotonic()


def _is_peer_id(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        PeerID.from_base58(text)
    except (ValueError, KeyError):
        return False
    return True
