"""The directory: who claims to serve what, kept fresh from a source of records."""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.records import Announcement, ServerFilter, Snapshot, read_snapshot

__all__ = ["Directory", "RecordSource"]

_log = logging.getLogger(__name__)


class RecordSource(Protocol):
    """Where records are read: the DHT, or what a simulator makes up."""

    async def read(self, blocks: Mapping[str, int]) -> tuple[Sequence[Announcement], int]:
        """Return the records under these keys, and how many entries are none of a server's. blocks: by key."""
        ...

    def now(self) -> float:
        """Return the time that records expire by, in seconds since the epoch."""
        ...


class Directory:
    """Snapshots of the records of one model. Used from the connection's event loop only.

    users: streams that are open and want the snapshot fresh.
    """

    def __init__(self, source: RecordSource, dht_prefix: str, num_blocks: int, peers: PeerBook):
        settings = peers.settings
        self._source = source
        self._blocks = {messages.block_uid(dht_prefix, block): block for block in range(num_blocks)}
        self._settings, self._runtime = settings, peers.runtime
        self._filter = ServerFilter(
            active_adapter=settings.active_adapter,
            dtype=settings.require_dtype,
            quant=settings.require_quant,
            allow=settings.allow_servers,
            deny=settings.deny_servers,
        )
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf
        self._is_used = True
        self.users = 0
        self._announcements: dict[tuple[int, str], Announcement] = {}  # the newest of each block and peer
        self.dht_prefix = dht_prefix
        self.snapshot = Snapshot(num_blocks, {})

    @property
    def is_announced(self) -> bool:
        """Whether anybody announced a block of the model, in whatever state, when this was last read."""
        return bool(self._announcements) or self.snapshot.dropped > 0

    async def refresh(self, *, older_than: float = 0.0) -> Snapshot:
        """Read the records, unless the last look is less than `older_than` seconds old; callers share one look."""
        if self._runtime.monotonic() - self._refreshed_at >= older_than:
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.create_task(self._read())
            await asyncio.shield(self._refreshing)
        return self.snapshot

    async def keep_fresh(self) -> None:
        """Refresh every update_period seconds until cancelled, as long as somebody uses it: a connection that is kept
        between the epochs of a training asks nothing of anybody."""
        while True:
            await asyncio.sleep(self._settings.update_period)
            if self._is_used or self.users:
                self._is_used = False
                await self._refresh_if_it_can(self._settings.update_period / 2)

    async def use(self) -> None:
        """Keep the snapshot fresh for a while, and refresh it first where nobody has used it for long."""
        self._is_used = True
        longest = 2 * self._settings.update_period
        if self._runtime.monotonic() - self._refreshed_at > longest:
            await self._refresh_if_it_can(longest)

    async def _refresh_if_it_can(self, older_than: float) -> None:
        try:
            await self.refresh(older_than=older_than)
        except Exception:  # noqa: BLE001  # see below
            # hivemind decodes strangers' values in there; whatever that raises, the last look holds.
            _log.debug("the directory could not be read", exc_info=True)

    async def _read(self) -> None:
        """Take in what the source says now. A record holds until it expires, also when the DHT cannot be asked: the
        nodes that kept it may be gone while its server is well."""
        now = self._source.now()
        known = {key: record for key, record in self._announcements.items() if record.expiration > now}
        announcements, malformed = await self._source.read(self._blocks)
        for found in announcements:
            before = known.get((found.block, found.peer_id))
            if before is None or before.expiration <= found.expiration:
                known[found.block, found.peer_id] = found
        self._announcements = known
        snapshot = read_snapshot(known.values(), len(self._blocks), self._filter)
        self.snapshot = replace(snapshot, dropped=snapshot.dropped + malformed)
        self._refreshed_at = self._runtime.monotonic()
        _log.debug("directory: %d servers, %d records dropped", len(snapshot.servers), self.snapshot.dropped)
