"""The DHT of a simulated swarm: what its servers announce, again and again, and late."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from petals_eval.local_swarm.faults import catalog as f
from petals_eval.simulator.scenario import Scenario
from petals_eval.simulator.servers import SimulatedServer
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.records import Announcement, ServerState
from petals_eval.swarm.wire.span import Span

__all__ = ["Records"]


class Records:
    """A `RecordSource` in which servers announce themselves. Used from one event loop, on its clock.

    A record outlives its server: it stays until it expires.
    """

    def __init__(self, scenario: Scenario, servers: Mapping[str, SimulatedServer], runtime: Runtime):
        self._scenario = scenario
        self._servers = servers
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._kept: dict[tuple[int, str], Announcement] = {}  # by block and peer id

    async def read(self, blocks: Mapping[str, int]) -> tuple[Sequence[Announcement], int]:
        now = self.now()
        self._kept = {key: each for key, each in self._kept.items() if each.expiration > now}
        return list(self._kept.values()), 0

    def now(self) -> float:
        return self._runtime.epoch()

    def begin(self) -> None:
        """Keep what the servers announced that are there, and let each announce itself from now on."""
        for name, server in self._servers.items():
            if not server.is_gone:
                for announcement in self._announced(name, server):
                    self._keep(announcement)
            self._loop.call_later(self._scenario.announce_seconds, self._again, name)

    def announce(self, name: str) -> None:
        """Let a server announce itself now; it is found when its delay is over."""
        server = self._servers[name]
        for announcement in self._announced(name, server):
            self._loop.call_later(server.described.record_delay, self._keep, announcement)

    def _again(self, name: str) -> None:
        if not self._servers[name].is_gone:
            self.announce(name)
        self._loop.call_later(self._scenario.announce_seconds, self._again, name)

    def _keep(self, announcement: Announcement) -> None:
        key = announcement.block, announcement.peer_id
        before = self._kept.get(key)
        if before is None or before.expiration <= announcement.expiration:
            self._kept[key] = announcement

    def _announced(self, name: str, server: SimulatedServer) -> Iterator[Announcement]:
        """Yield the records of a server: one, under its first block, which names them all."""
        faults, described = server.faults, server.described
        if faults.active_in_record(f.StaleRecord):
            return
        state, span, seconds_off = ServerState.ONLINE, server.blocks, 0.0
        if faults.active_in_record(f.JoiningForEver):
            state = ServerState.JOINING
        if claim := faults.active_in_record(f.ClaimsSpan):
            span = Span(claim.start, claim.stop)
        lie = faults.active_in_record(f.ClaimsDtype)
        if clock := faults.active_in_record(f.ClockSkew):
            seconds_off = clock.seconds_off
        extra = {
            "start_block": span.start,
            "end_block": span.stop,
            "version": server.version,
            "torch_dtype": self._scenario.dtype if lie is None else lie.dtype,
            "cache_tokens_left": 2 * server.free_cache,  # keys and values count apart
            "forward_rps": described.claimed_pace,
        }
        expiration = self.now() + seconds_off + 2 * self._scenario.announce_seconds
        names = [name, f"nobody beside {name}"] if faults.active_in_record(f.RecordWithoutServer) else [name]
        yield from (Announcement(span.start, each, (int(state), 1.0, extra), expiration) for each in names)
