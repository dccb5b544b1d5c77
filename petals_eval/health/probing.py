"""Levels `info` and `forward`: ask one server what it is, and let it compute. Behind a seam: tests need no network."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch

from petals_eval.errors import PeerCacheFullError, PeerError, PeerRefusedError
from petals_eval.health.canary import Segment, canary_for
from petals_eval.health.census import Claim, age
from petals_eval.health.findings import finding, from_forward_error, from_info_error
from petals_eval.health.locked import LockedServers
from petals_eval.health.results import Finding, ServerHealth
from petals_eval.health.settings import HealthSettings, Level
from petals_eval.health.verdict import of_server
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import TokenLimits
from petals_eval.swarm.peers.peer import in_words
from petals_eval.swarm.transport.client import Answer, Asked
from petals_eval.swarm.trust.determinism import TOLERANCE, difference
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import ServerState, SpanServer
from petals_eval.text import printable

__all__ = ["Calls", "Count", "ProbeCalls", "Probed", "Prober"]

_MISSED = 0.75  # of the announce period: a record with less time left than this should have been renewed
_MOST_ADAPTERS = 3  # of those a server announces, to try
_PAUSES = (0.0, 0.5, 1.0)  # seconds before a server is asked for a session, as often as it refuses one


class ProbeCalls(Protocol):
    """What probes ask of a server; `petals_eval.swarm.transport.client.RemoteCalls` is one."""

    async def ask_info(self, peer_id: str, block: int) -> Asked: ...

    async def forward(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> Answer: ...

    async def session(self, hop: Hop, batch: int, max_length: int) -> "OpenSession": ...


class OpenSession(Protocol):
    """One whose cache is reserved."""

    async def close(self) -> None: ...


class Calls(Protocol):
    """Everything the probes need of the network."""

    def with_adapter(self, adapter: str | None) -> ProbeCalls: ...

    async def is_connected(self, peer_id: str) -> bool: ...


@dataclass(slots=True)
class Probed:
    """What is known of one server so far."""

    claim: Claim
    findings: list[Finding] = field(default_factory=list)
    info: wire.ServerInfo | None = None
    round_trip: float | None = None
    tokens_per_second: float | None = None
    asked: dict[Level, bool] = field(default_factory=dict)  # whether it passed
    compared: int = 0

    @property
    def server(self) -> SpanServer:
        return SpanServer(self.claim.peer_id, self.claim.start, self.claim.end, self.claim.record)

    @property
    def is_online(self) -> bool:
        return self.claim.record.state is ServerState.ONLINE

    def found(self, found: Finding) -> None:
        if all((each.name, each.detail) != (found.name, found.detail) for each in self.findings):
            self.findings.append(found)

    def result(self, settings: HealthSettings) -> ServerHealth:
        claim, record, info = self.claim, self.claim.record, self.info
        verdict = of_server(self.findings, self.asked.get(Level.FORWARD, False))
        probes = {
            level.text: "not asked" if level not in self.asked else "passed" if self.asked[level] else "failed"
            for level in (Level.RECORD, Level.INFO, Level.FORWARD)
        }
        return ServerHealth(
            peer_id=claim.peer_id,
            public_name=record.public_name,
            start=claim.start,
            end=claim.end,
            state=record.state.name.lower(),
            seen=self._seen(),
            version=record.version,
            version_seen=_short(info.version) if info else None,
            dtype=_dtype(record.torch_dtype),
            dtype_seen=wire.dtype_name(info.output_dtype) if info else None,
            quant_type=record.quant_type,
            adapters=tuple(_short(each) or "" for each in record.adapters),
            using_relay=record.using_relay,
            throughput=record.throughput,
            tokens_per_second=self.tokens_per_second,
            cache_tokens_left=record.cache_tokens_left,
            cache_tokens_seen=info.cache_tokens_available if info else None,
            round_trip=self.round_trip,
            record_age=age(claim.remaining, settings.announce_period),
            probes=probes,
            compared=self.compared,
            findings=tuple(self.findings),
            verdict=verdict,
        )

    def _seen(self) -> str:
        if Level.INFO not in self.asked:
            return "not asked"
        names = {each.name for each in self.findings}
        if names & {"record-without-server", "unreachable"}:
            return "unreachable"
        if "no-answer" in names:
            return "silent"
        return "answers" if self.asked[Level.INFO] and self.asked.get(Level.FORWARD, True) else "fails"


def _short(text: str | None) -> str | None:
    return None if text is None else printable(text, longest=80)


def _dtype(name: str | None) -> str | None:
    return None if name is None else name.removeprefix("torch.")


@dataclass(slots=True)
class Count:
    """Calls made and bytes of their messages."""

    calls: int = 0
    sent: int = 0
    received: int = 0

    def add(self, one: "Answer | Asked") -> None:
        self.calls += 1
        self.sent += one.bytes_sent
        self.received += one.bytes_received


class Prober:
    """Asks servers of one model. Concurrency is the caller's."""

    def __init__(self, calls: Calls, num_blocks: int, settings: HealthSettings, locked: LockedServers | None = None):
        """locked: servers that opened no session in looks before this one."""
        self._network = calls
        self._calls = calls.with_adapter(settings.active_adapter)
        self._num_blocks = num_blocks
        self._settings = settings
        self._limits = TokenLimits(None)
        self._locked = locked or LockedServers()
        self.count = Count()

    def record(self, claim: Claim) -> Probed:
        """Level `record`: what the claim says against itself."""
        probed, record = Probed(claim), claim.record
        if record.state is ServerState.JOINING:
            probed.found(finding("joining", "it announces JOINING"))
        if claim.start >= claim.end or claim.end > self._num_blocks:
            probed.found(finding("wrong-span", f"it names blocks {claim.start}:{claim.end} of {self._num_blocks}"))
        else:
            named = set(range(claim.start, claim.end))
            outside = sorted(set(claim.found) - named)
            if outside:
                text = f"its record names blocks {claim.start}:{claim.end} and lies under block {outside[0]}, too"
                probed.found(finding("wrong-span", text))
            left = sorted(set(claim.left) - named)
            if left:
                text = f"old records still name block {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else "")
                probed.found(finding("stale-record", text))
        if claim.remaining < _MISSED * self._settings.announce_period:
            text = f"last announced {age(claim.remaining, self._settings.announce_period) or 0:.0f} s ago, every "
            text += f"{self._settings.announce_period:.0f} s is usual; it ends in {claim.remaining:.0f} s"
            probed.found(finding("stale-record", text))
        wanted = self._settings.active_adapter
        if wanted is not None and wanted not in record.adapters:
            probed.found(finding("adapter-not-announced", f"does not announce adapter {wanted}"))
        probed.asked[Level.RECORD] = not probed.findings
        return probed

    async def info(self, probed: Probed) -> None:
        """Level `info`: its first and its last block, which also shows the round trip on a warm connection."""
        claim = probed.claim
        last = max(claim.start, min(claim.end, self._num_blocks) - 1)
        try:
            asked = await self._ask(claim.peer_id, claim.start)
            probed.info = asked.info
            again = await self._ask(claim.peer_id, last)
        except PeerError as error:
            connected = await self._network.is_connected(claim.peer_id)
            probed.found(from_info_error(error, f"{claim.start}:{last + 1}", is_connected=connected))
            probed.asked[Level.INFO] = False
            return
        probed.round_trip = again.seconds
        before = len(probed.findings)
        self._hold_against_record(probed, asked.info)
        probed.asked[Level.INFO] = len(probed.findings) == before

    async def _ask(self, peer_id: str, block: int) -> Asked:
        asked = await self._calls.ask_info(peer_id, block)
        self.count.add(asked)
        return asked

    def _hold_against_record(self, probed: Probed, info: wire.ServerInfo) -> None:
        record = probed.claim.record
        said, seen = _dtype(record.torch_dtype), wire.dtype_name(info.output_dtype)
        if said is not None and said != seen:
            probed.found(finding("dtype-mismatch", f"announces {said}, answers in {seen}"))
        if record.version is not None and info.version is not None and record.version != info.version:
            text = f"announces petals {record.version}, says {_short(info.version)} when asked"
            probed.found(finding("version-mismatch", text))

    async def forward(self, probed: Probed, hidden_size: int) -> torch.Tensor | None:
        """Level `forward`: the whole span twice. Returns one of its answers where the two are alike."""
        claim = probed.claim
        span = (claim.start, min(claim.end, self._num_blocks))
        question = canary_for(span, hidden_size, self._settings.canary_positions)
        probed.asked[Level.FORWARD] = False
        try:
            first, found, allowed = await self._twice(probed, span, question)
            if 0 < found <= allowed and span[1] - span[0] > 1:
                found = max(found, await self._block_by_block(probed, span, question))
            if found > allowed:
                text = f"two answers to one question (difference {found:.2g}, rounding explains {allowed:g})"
                probed.found(finding("nondeterministic", text))
                return None
            await self._try_adapters(probed, hidden_size)
        except PeerError as error:
            probed.found(from_forward_error(error, f"{span[0]}:{span[1]}"))
            return None
        probed.asked[Level.FORWARD] = True
        return first.hidden

    async def part(self, probed: Probed, segment: Segment, hidden_size: int) -> torch.Tensor | None:
        """The answer of blocks within its span, for comparing it with other servers."""
        question = canary_for(segment, hidden_size, self._settings.canary_positions)
        try:
            return (await self._compute(probed, segment, question)).hidden
        except PeerError as error:
            probed.found(from_forward_error(error, f"{segment[0]}:{segment[1]}"))
            probed.asked[Level.FORWARD] = False
            return None

    async def session(self, probed: Probed) -> None:
        """Level `forward`: whether a session opens, with room for one token in one block, and closed at once.

        Only where its sessions are those of Petals, and where it says right then that its cache has room. What refuses
        all the same is asked again: others may be waiting for more than there is.
        """
        peer_id = probed.claim.peer_id
        found = self._locked.known(peer_id)
        if found is None:
            try:
                found = await self._refusal_of_a_session(probed)
            except PeerError as error:
                found = finding("opens-no-session", in_words(error))
            if found is None:
                return
            self._locked.add(peer_id, found)
        probed.found(found)

    async def _refusal_of_a_session(self, probed: Probed) -> Finding | None:
        """Raises PeerError, but for a full cache."""
        refusal = ""
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            info = (await self._ask(probed.claim.peer_id, probed.claim.start)).info
            if wire.other_layout(info) or not info.cache_tokens_available:
                return None
            self.count.calls += 1
            try:
                hop = Hop(probed.server, probed.claim.start, probed.claim.start + 1)
                await (await self._calls.session(hop, batch=1, max_length=1)).close()
                return None
            except PeerCacheFullError as error:
                refusal = f"it says that {info.cache_tokens_available:,} tokens of its cache are free: {error}"
        return finding("opens-no-session", refusal)

    async def _twice(self, probed: Probed, span: Segment, question: torch.Tensor) -> tuple[Answer, float, float]:
        """An answer, the difference of two, and what rounding explains."""
        first = await self._compute(probed, span, question)
        started = time.monotonic()
        second = await self._compute(probed, span, question)
        tokens = second.hidden.shape[0] * second.hidden.shape[1]
        probed.tokens_per_second = tokens / max(1e-6, time.monotonic() - started)
        rows, positions = second.hidden.shape[:2]
        apart = difference(question[:rows, :positions], first.hidden[:rows, :positions], second.hidden)
        return first, apart, TOLERANCE[second.hidden.dtype]

    async def _block_by_block(self, probed: Probed, span: Segment, question: torch.Tensor) -> float:
        """The largest difference of a single block: dropout in one is thinned by what the others do."""
        largest = 0.0
        for block in range(*span):
            _, found, _ = await self._twice(probed, (block, block + 1), question)
            largest = max(largest, found)
        return largest

    async def _try_adapters(self, probed: Probed, hidden_size: int) -> None:
        """Its first block with the LoRA adapters it announces."""
        claim = probed.claim
        for adapter in claim.record.adapters[:_MOST_ADAPTERS]:
            block = (claim.start, claim.start + 1)
            question = canary_for(block, hidden_size, self._settings.canary_positions)[:1]
            try:
                hop = Hop(probed.server, *block)
                self.count.add(await self._network.with_adapter(adapter).forward(hop, question, None))
            except PeerError as error:
                probed.found(finding("adapter-fails", f"{adapter}: {error}"))

    async def _compute(self, probed: Probed, blocks: Segment, question: torch.Tensor) -> Answer:
        hop = Hop(probed.server, *blocks)
        peer_id = probed.claim.peer_id
        while True:
            limit = self._limits.per_call(peer_id)
            if limit is not None and question.shape[0] * question.shape[1] > limit:
                question = question[: max(1, limit // question.shape[1]), :limit]
            try:
                answer = await self._calls.forward(hop, question, None)
                self.count.add(answer)
                return answer
            except PeerRefusedError as error:
                if not self._limits.learn_per_call(peer_id, error, question.shape[0] * question.shape[1]):
                    raise
