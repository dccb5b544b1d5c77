"""A look at a swarm: census, probes level by level under one time limit, verdicts."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from petals_eval.health import verdict as rules
from petals_eval.health.canary import canary_for, segments_of, shared_segments
from petals_eval.health.census import AnnouncedModel, Census
from petals_eval.health.compare import Ballot
from petals_eval.health.dialing import dial_bootstrap
from petals_eval.health.findings import finding, from_trust
from petals_eval.health.live import LiveSwarm, RouteTimes, try_route
from petals_eval.health.locked import LockedServers
from petals_eval.health.probing import Network, Prober, ServerProbe
from petals_eval.health.reference_blocks import ReferenceBlocks, blocks_of, load_reference_blocks
from petals_eval.health.results import BootstrapPeer, Finding, HealthReport, ModelHealth, Traffic, Verdict
from petals_eval.health.settings import HealthSettings, Level
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.announced import not_announced
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.wire.span import Span, joined, spans_text
from petals_eval.text import plural

__all__ = ["ModelProbe", "ProbeRun", "Swarm", "check", "check_health", "probe_swarm"]

_log = logging.getLogger(__name__)

_MIN_ROUTE_SECONDS = 1.0  # with less left the route is not tried


class Swarm(Protocol):
    """What a look needs of a swarm; the seam for tests and simulations."""

    async def models(self) -> tuple[list[AnnouncedModel], int]:
        """Return every model that is announced, and how many entries cannot be read."""
        ...

    async def count_blocks(self, prefix: str) -> int:
        """Return how many blocks a model has that is not announced."""
        ...

    async def census(self, model: AnnouncedModel) -> Census:
        """Return who claims to serve a model."""
        ...

    def network(self, prefix: str) -> Network:
        """Return a way to its servers."""
        ...


def check_health(initial_peers: str | Sequence[str] = (), **settings: Any) -> HealthReport:
    """Look at a swarm once, over a connection of its own.

    settings: fields of HealthSettings, such as models, level, time_limit and concurrency.
    initial_peers: one address or several.
    Raises ConfigError, ModelError for blocks at home that cannot be loaded, and SwarmUnreachableError when no initial
    peer answers. What is wrong with servers is in the report and raises nothing.
    """
    return check(HealthSettings(**{"initial_peers": initial_peers, **settings}))


def check(settings: HealthSettings, locked: LockedServers | None = None) -> HealthReport:
    """Do what `check_health` does, with its settings in one piece.

    locked: servers that opened no session in looks before this one, and what this one adds.
    """
    from petals_eval.swarm import SwarmConnection

    reference = load_reference_blocks(settings)
    if settings.model is not None and settings.num_blocks is None:
        settings = settings.model_copy(update={"num_blocks": blocks_of(settings.model)})
    started, began = time.monotonic(), time.time()
    deadline = started + settings.time_limit
    with SwarmConnection.connect(settings.for_swarm()) as connection:
        timeout = min(settings.connect_timeout, settings.time_limit)
        dialled = connection.loop.start(_ask_bootstrap, settings, timeout)
        run = connection.loop.run(probe_swarm, LiveSwarm(connection), settings, deadline, reference, locked)
        routes: dict[str, RouteTimes | Finding] = {}
        for model in run.models if settings.level >= Level.ROUTE else ():
            left = deadline - time.monotonic()
            if model.hidden_size is not None and model.has_usable_route and left > _MIN_ROUTE_SECONDS:
                announced = model.census.model
                found = try_route(connection, announced, model.hidden_size, settings.canary_positions, timeout=left)
                if found is not None:
                    routes[announced.prefix] = found
        bootstrap = dialled.result()
    return run.report(began, time.monotonic() - started, routes, bootstrap)


async def _ask_bootstrap(settings: HealthSettings, timeout: float) -> tuple[BootstrapPeer, ...]:
    if settings.level < Level.INFO:
        return tuple(BootstrapPeer(address, "not asked") for address in settings.initial_peers)
    return await dial_bootstrap(settings.initial_peers, timeout)


class ProbeRun:
    """What came of asking all servers; the route is tried afterwards."""

    def __init__(self, settings: HealthSettings, models: "Sequence[ModelProbe]", notes: Sequence[str]):
        self._settings = settings
        self.models = tuple(models)
        self._notes = tuple(notes)

    def report(
        self,
        began: float,
        seconds: float,
        routes: "dict[str, RouteTimes | Finding]",
        bootstrap: Sequence[BootstrapPeer] = (),
    ) -> HealthReport:
        """Return the report. began: seconds since the epoch. routes: by prefix, for those that were tried."""
        models = tuple(model.result(routes.get(model.census.model.prefix)) for model in self.models)
        counts = [model.prober.traffic for model in self.models]
        traffic = Traffic(
            sum(each.calls for each in counts),
            sum(each.bytes_sent for each in counts),
            sum(each.bytes_received for each in counts),
        )
        verdict = rules.of_swarm(model.verdict for model in models)
        notes = self._notes if models else (*self._notes, "no model is announced on this swarm")
        return HealthReport(began, seconds, self._settings.level, verdict, models, traffic, notes, tuple(bootstrap))


async def probe_swarm(
    swarm: Swarm,
    settings: HealthSettings,
    deadline: float,
    reference: ReferenceBlocks | None = None,
    locked: LockedServers | None = None,
    runtime: Runtime | None = None,
) -> ProbeRun:
    """Ask every server of the models chosen, as far as the level says.

    deadline: on the runtime's monotonic clock. reference: blocks of one of the models, to hold its servers against.
    locked: servers that opened no session in looks before this one.
    """
    announced, malformed = await swarm.models()
    notes = [f"{malformed} announced models cannot be read"] if malformed else []
    chosen = announced
    if settings.models:
        known = {model.prefix: model for model in announced}
        chosen = [await _named(swarm, prefix, known.get(prefix), settings) for prefix in dict.fromkeys(settings.models)]
    runtime = runtime or Runtime()
    budget = _Budget(settings.concurrency, deadline, runtime)
    models = []
    for model in chosen:
        judge = reference if reference is not None and reference.prefix == model.prefix else None
        prober = Prober(swarm.network(model.prefix), model.num_blocks, settings, locked, runtime)
        models.append(ModelProbe(await swarm.census(model), announced, prober, settings, budget, judge, runtime))
    await asyncio.gather(*(model.run() for model in models))
    return ProbeRun(settings, models, notes)


async def _named(
    swarm: Swarm, prefix: str, announced: AnnouncedModel | None, settings: HealthSettings
) -> AnnouncedModel:
    if settings.num_blocks is not None:
        return AnnouncedModel(prefix, settings.num_blocks, announced.repository if announced else None)
    return announced or AnnouncedModel(prefix, await swarm.count_blocks(prefix), None, is_counted=True)


class _Budget:
    """Places for servers that are asked at once, until the time is out."""

    def __init__(self, places: int, deadline: float, runtime: Runtime):
        self._places = asyncio.Semaphore(places)
        self._deadline = deadline
        self._runtime = runtime

    async def spend(self, ask: Callable[[], Awaitable[None]]) -> bool:
        """Return whether it came to its end in time; where not, it was cancelled or never begun."""
        async with self._places:
            try:
                async with asyncio.timeout(self._deadline - self._runtime.monotonic()):
                    await ask()
            except TimeoutError:
                return False
        return True


class ModelProbe:
    """The probes of one model's servers.

    announced: the models that the swarm announces. hidden_size: of the canary, once it is known.
    """

    def __init__(
        self,
        census: Census,
        announced: Sequence[AnnouncedModel],
        prober: Prober,
        settings: HealthSettings,
        budget: _Budget,
        reference: ReferenceBlocks | None,
        runtime: Runtime,
    ):
        self.census = census
        self._announced = announced
        self.prober = prober
        self.hidden_size = settings.hidden_size or (reference.hidden_size if reference is not None else None)
        self._reference = reference
        self._settings = settings
        self._budget = budget
        self._runtime = runtime
        self._probes = [prober.probe_record(claim) for claim in census.claims]
        self._compared: set[int] = set()

    async def run(self) -> None:
        """Ask every server, as far as the level says."""
        online = [probe for probe in self._probes if probe.is_online]
        if self._settings.level >= Level.INFO:
            await asyncio.gather(
                *(self._ask(probe, Level.INFO, partial(self.prober.probe_info, probe)) for probe in online)
            )
        if self._settings.level >= Level.FORWARD:
            answering = [(probe, probe.span) for probe in online if probe.info is not None and probe.span is not None]
            self._agree_on_hidden_size([probe for probe, _ in answering])
            if self.hidden_size is not None:
                fit = [each for each in answering if not each[0].has_finding("hidden-size-mismatch")]
                await self._compare(fit, self.hidden_size)

    async def _ask(self, probe: ServerProbe, level: Level, ask: Callable[[], Awaitable[None]]) -> None:
        known = len(probe.findings)
        try:
            in_time = await self._budget.spend(ask)
        except Exception as error:  # noqa: BLE001  # see below
            # What a stranger does wrong is a PeerError and was dealt with. This one is ours, and says nothing of the
            # server; what was found out about the others holds all the same.
            _log.exception("a probe of %s failed", probe.server.peer_id)
            probe.add_finding(finding("probe-error", f"{type(error).__name__}: {error}", level=level))
            probe.passed.pop(level, None)
            return
        if not in_time and len(probe.findings) == known:
            probe.passed.pop(level, None)

    def _agree_on_hidden_size(self, answering: Sequence[ServerProbe]) -> None:
        """Take the one most servers say, unless it is given; those that say another are wrong."""
        sizes = Counter(each.info.hidden_size for each in answering if each.info and each.info.hidden_size)
        if self.hidden_size is None and sizes:
            self.hidden_size = sizes.most_common(1)[0][0]
        for probe in answering:
            said = probe.info.hidden_size if probe.info else None
            if said is not None and said != self.hidden_size:
                text = f"its hidden states have {said} channels, the model's {self.hidden_size}"
                probe.add_finding(finding("hidden-size-mismatch", text))
                probe.passed[Level.INFO] = False

    async def _compare(self, answering: Sequence[tuple[ServerProbe, Span]], hidden_size: int) -> None:
        """Let servers compute their spans, and hold what they answer against each other or blocks at home."""
        held = [span for _, span in answering]
        if self._reference is not None:
            held.append(self._reference.span)
        segments = segments_of(held)
        holders = [sum(map(segment.within, held)) for segment in segments]
        ballots = {
            segment: Ballot(canary_for(segment, hidden_size, self._settings.canary_positions), segment)
            for segment, count in zip(segments, holders, strict=True)
            if count > 1
        }
        await asyncio.gather(
            *(
                self._ask(probe, Level.FORWARD, partial(self._compute, probe, span, shared, hidden_size))
                for probe, span in answering
                for shared in [[ballots[segment] for segment in shared_segments(span, segments, holders)]]
            )
        )
        for ballot in ballots.values():
            await self._judge(ballot)

    async def _compute(self, probe: ServerProbe, span: Span, ballots: Sequence[Ballot], hidden_size: int) -> None:
        whole = await self.prober.probe_forward(probe, span, hidden_size)
        if whole is None:
            return
        for ballot in ballots:
            segment = ballot.span
            hidden = whole if segment == span else await self.prober.compute_segment(probe, segment, hidden_size)
            if hidden is None:
                return
            ballot.add(RecordedCall(Hop(probe.server, segment), Activations(ballot.question), hidden))
        await self.prober.probe_session(probe)

    async def _judge(self, ballot: Ballot) -> None:
        probes = {probe.server.peer_id: probe for probe in self._probes}
        voters = ballot.voters
        at_home = self._reference is not None and ballot.span.within(self._reference.span)
        if voters and (at_home or len(voters) > 1):
            self._compared.update(range(ballot.span.start, ballot.span.stop))
            for server in voters:
                probes[server.peer_id].compared += len(ballot.span)
        if self._reference is not None and at_home:
            caught = await self._reference.findings(ballot, self._runtime.in_thread)
        else:
            caught = ballot.findings()
        for trust_finding in caught:
            found = from_trust(trust_finding, voters=len(voters), answers=len(ballot.camps))
            probe = probes[trust_finding.server.peer_id]
            if not probe.has_finding(found.name):  # once is enough, however many segments show it
                probe.add_finding(found)
            probe.passed[Level.FORWARD] = False

    @property
    def has_usable_route(self) -> bool:
        """Whether servers that are not broken hold all blocks between them."""
        servers = [probe.result(self._settings) for probe in self._probes]
        return not rules.missing_spans(rules.replicas(self.census.model.num_blocks, servers, rules.NOT_BROKEN))

    def result(self, route: "RouteTimes | Finding | None") -> ModelHealth:
        """Return what was found of the model. route: what came of trying it; None: it was not tried."""
        model, settings = self.census.model, self._settings
        servers = tuple(probe.result(settings) for probe in self._probes)
        replicas = rules.replicas(model.num_blocks, servers, rules.NOT_BROKEN)
        missing = rules.missing_spans(replicas)
        findings = tuple(self._own_findings(replicas, missing, route))
        times = route if isinstance(route, RouteTimes) else None
        verdict, why = rules.of_model(model.num_blocks, servers, findings, settings.level, times is not None)
        has_route = None
        if settings.level >= Level.INFO:
            answering = [server for server in servers if server.seen == "answers"]
            answered = rules.replicas(model.num_blocks, answering, rules.NOT_BROKEN)
            has_route = model.num_blocks > 0 and all(answered)
        return ModelHealth(
            name=model.prefix,
            repository=model.repository,
            num_blocks=model.num_blocks,
            level=settings.level,
            verdict=verdict,
            why=why,
            replicas=replicas,
            claimed=rules.replicas(model.num_blocks, servers, frozenset(Verdict)),
            missing=tuple((span.start, span.stop) for span in missing),
            compared=tuple((span.start, span.stop) for span in joined(sorted(self._compared))),
            has_route=has_route,
            route_seconds=times.seconds if times else None,
            route_tokens_per_second=times.tokens_per_second if times else None,
            servers=servers,
            findings=findings,
        )

    def _own_findings(
        self, replicas: Sequence[int], missing: Sequence[Span], route: "RouteTimes | Finding | None"
    ) -> list[Finding]:
        found: list[Finding] = []
        model = self.census.model
        if not self.census.claims:
            found.append(finding("not-announced", not_announced(model.prefix, self._announced)))
        elif missing:
            found.append(finding("missing-blocks", f"no usable server holds blocks {spans_text(missing)}"))
        if self.census.claims and model.is_counted:
            seen = f"servers announce {plural(model.num_blocks, 'block')}, and no index says whether the model has more"
            found.append(finding("blocks-unknown", f"{seen}: give --num-blocks, or --model"))
        least = self._settings.min_replicas
        thin = joined(block for block, count in enumerate(replicas) if 0 < count < least)
        if thin:
            found.append(finding("thin-blocks", f"blocks {spans_text(thin)} have fewer than {least} servers"))
        if self.census.malformed:
            found.append(finding("malformed-records", f"{self.census.malformed} records cannot be read"))
        if isinstance(route, Finding):
            found.append(route)
        return found
