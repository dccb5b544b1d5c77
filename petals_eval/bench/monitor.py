"""What goes on around a run: how busy each server is with our work, what moves, and what it costs the client."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from petals_eval.bench.floor import link_seconds
from petals_eval.bench.processes import memory, processor_seconds, tree
from petals_eval.bench.target import BenchTarget
from petals_eval.local_swarm.network import LinkUse

__all__ = ["ResourceMonitor", "ResourceUse", "ServerShare"]

_SAMPLING_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ServerShare:
    """What one server did in a run.

    calls; tokens computed, and their share of those of all servers' calls; bytes sent to it and received from it.
    busy: share of the time in which it had work of ours, on the network or in its blocks; None in sessions, whose steps
        nobody counts.
    processor: share of the time its processes computed, where they run on this machine; else None.
    """

    calls: int
    tokens: int
    share: float
    bytes_sent: int
    bytes_received: int
    busy: float | None
    processor: float | None


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """A run, seen from around it.

    seconds: its length. link_use: share of the time that the busiest direction of any link was busy; None where links
    are not known. client_processor: seconds of this process and its daemon. client_memory: their greatest resident
    bytes. retries: of all calls.
    """

    seconds: float
    servers: dict[str, ServerShare]
    link_use: float | None
    client_processor: float
    client_memory: int
    retries: int


@dataclass(frozen=True, slots=True)
class _Counters:
    at: float
    servers: dict[str, tuple[int, int, int, int]]
    links: list[LinkUse]
    client: float
    server_processors: dict[str, float]
    retries: int


class ResourceMonitor:
    """Watches a target while a `with` block runs; `result()` after it.

    The client's processor time includes that of the watching itself, a few percent of one processor.
    """

    def __init__(self, target: BenchTarget):
        self._target = target
        self._busy: Counter[str] = Counter()
        self._looks = 0
        self._memory = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="bench monitor", daemon=True)

    def __enter__(self) -> "ResourceMonitor":
        self._before = self._count()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._after = self._count()

    def result(self) -> ResourceUse:
        before, after = self._before, self._after
        seconds = after.at - before.at
        did = {
            peer: tuple(new - old for new, old in zip(counts, before.servers.get(peer, (0,) * 4), strict=True))
            for peer, counts in after.servers.items()
        }
        all_tokens = sum(tokens for _, tokens, _, _ in did.values())
        servers = {
            peer: ServerShare(
                calls=calls,
                tokens=tokens,
                share=tokens / all_tokens if all_tokens else 0.0,
                bytes_sent=sent,
                bytes_received=received,
                busy=self._busy[peer] / self._looks if self._busy[peer] else None,
                processor=self._processor_share(peer, seconds),
            )
            for peer, (calls, tokens, sent, received) in did.items()
            if calls
        }
        busiest = link_seconds([new.since(old) for old, new in zip(before.links, after.links, strict=True)])
        return ResourceUse(
            seconds=seconds,
            servers=servers,
            link_use=busiest / seconds if after.links else None,
            client_processor=after.client - before.client,
            client_memory=self._memory,
            retries=after.retries - before.retries,
        )

    def _processor_share(self, peer: str, seconds: float) -> float | None:
        if peer not in self._after.server_processors:
            return None
        return (self._after.server_processors[peer] - self._before.server_processors.get(peer, 0.0)) / seconds

    def _count(self) -> _Counters:
        blocks = self._target.blocks
        return _Counters(
            at=time.perf_counter(),
            servers={
                peer: (seen.calls, seen.tokens, seen.bytes_sent, seen.bytes_received)
                for peer, seen in list(blocks.peers.items())
            },
            links=self._target.link_use(),
            client=processor_seconds(self._target.client),
            server_processors={
                peer: processor_seconds(tree(pid)) for peer, pid in self._target.server_processes.items()
            },
            retries=blocks.status().retries,
        )

    def _look(self) -> None:
        while not self._end.wait(_SAMPLING_SECONDS):
            if self._looks % 10 == 0:
                self._memory = max(self._memory, memory(self._target.client))
            self._looks += 1
            for peer, seen in list(self._target.blocks.peers.items()):
                if seen.tokens_in_flight > 0:
                    self._busy[peer] += 1
