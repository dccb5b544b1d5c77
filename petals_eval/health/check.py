"""A look at a swarm: census, probes level by level under one time limit, verdicts."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from petals_eval.health import verdict as rules
from petals_eval.health.canary import Segment, canary_for, segments_of, shared_segments
from petals_eval.health.census import AnnouncedModel, Census
from petals_eval.health.compare import Answered, Votes
from petals_eval.health.findings import finding
from petals_eval.health.live import LiveSwarm, RouteTimes, try_route
from petals_eval.health.locked import LockedServers
from petals_eval.health.probing import Calls, Probed, Prober
from petals_eval.health.reference_blocks import Home, load_home
from petals_eval.health.results import Finding, HealthReport, ModelHealth, Traffic, Verdict
from petals_eval.health.settings import HealthSettings, Level

__all__ = ["Looked", "Swarm", "check", "check_health", "look"]

_log = logging.getLogger(__name__)

_LEAST_FOR_A_ROUTE = 1.0  # seconds: with less left the route is not tried


class Swarm(Protocol):
    """What a look needs of a swarm; the seam for tests and simulations."""

    async def models(self) -> tuple[list[AnnouncedModel], int]: ...

    async def count_blocks(self, prefix: str) -> int: ...

    async def census(self, model: AnnouncedModel) -> Census: ...

    def calls(self, prefix: str) -> Calls: ...


def check_health(initial_peers: str | Sequence[str] = (), **settings: Any) -> HealthReport:
    """Look at a swarm once, over a connection of its own.

    settings: fields of HealthSettings, such as models, level, time_limit and concurrency.
    initial_peers: one address or several.
    Raises ConfigError, ModelError for blocks at home that cannot be loaded, and SwarmUnreachableError when no initial
    peer answers. What is wrong with servers is in the report and raises nothing.
    """
    return check(HealthSettings(**{"initial_peers": initial_peers, **settings}))


def check(chosen: HealthSettings, locked: LockedServers | None = None) -> HealthReport:
    """`check_health` with its settings in one piece.

    locked: servers that opened no session in looks before this one, and what this one adds.
    """
    from petals_eval.swarm import SwarmConnection

    home = load_home(chosen)
    started, began = time.monotonic(), time.time()
    with SwarmConnection.connect(LiveSwarm.settings(chosen)) as connection:
        looked = connection.run(look, LiveSwarm(connection), chosen, started + chosen.time_limit, home, locked)
        routes: dict[str, RouteTimes | Finding] = {}
        for model in looked.models if chosen.level >= Level.ROUTE else ():
            left = started + chosen.time_limit - time.monotonic()
            if model.hidden_size is not None and model.has_usable_route and left > _LEAST_FOR_A_ROUTE:
                found = try_route(
                    connection, model.census.model, model.hidden_size, chosen.canary_positions, timeout=left
                )
                if found is not None:
                    routes[model.census.model.prefix] = found
    return looked.report(began, time.monotonic() - started, routes)


class Looked:
    """Everything asked of servers; the route is tried afterwards."""

    def __init__(self, settings: HealthSettings, models: "Sequence[_ModelLook]", notes: Sequence[str]):
        self._settings = settings
        self.models = tuple(models)
        self._notes = tuple(notes)

    def report(self, began: float, seconds: float, routes: "dict[str, RouteTimes | Finding]") -> HealthReport:
        """routes: by prefix, for those that were tried."""
        models = tuple(model.result(routes.get(model.census.model.prefix)) for model in self.models)
        traffic = Traffic(
            sum(model.prober.count.calls for model in self.models),
            sum(model.prober.count.sent for model in self.models),
            sum(model.prober.count.received for model in self.models),
        )
        verdict = rules.of_swarm(model.verdict for model in models)
        notes = self._notes if models else (*self._notes, "no model is announced on this swarm")
        return HealthReport(began, seconds, self._settings.level, verdict, models, traffic, notes)


async def look(
    swarm: Swarm,
    settings: HealthSettings,
    deadline: float,
    home: Home | None = None,
    locked: LockedServers | None = None,
) -> Looked:
    """Ask every server of the models chosen, as far as the level says.

    deadline: on the monotonic clock. home: blocks of one of the models, to hold its servers against. locked: servers
    that opened no session in looks before this one.
    """
    announced, malformed = await swarm.models()
    notes = [f"{malformed} announced models cannot be read"] if malformed else []
    chosen = announced
    if settings.models:
        known = {model.prefix: model for model in announced}
        chosen = [await _named(swarm, prefix, known.get(prefix), settings) for prefix in dict.fromkeys(settings.models)]
    budget = _Budget(settings.concurrency, deadline)
    looks = []
    for model in chosen:
        judge = home if home is not None and home.prefix == model.prefix else None
        prober = Prober(swarm.calls(model.prefix), model.num_blocks, settings, locked)
        looks.append(_ModelLook(await swarm.census(model), prober, settings, budget, judge))
    await asyncio.gather(*(each.ask() for each in looks))
    return Looked(settings, looks, notes)


async def _named(
    swarm: Swarm, prefix: str, announced: AnnouncedModel | None, settings: HealthSettings
) -> AnnouncedModel:
    if settings.num_blocks is not None:
        return AnnouncedModel(prefix, settings.num_blocks, announced.repository if announced else None)
    return announced or AnnouncedModel(prefix, await swarm.count_blocks(prefix), None)


class _Budget:
    """Places for servers that are asked at once, until the time is out."""

    def __init__(self, places: int, deadline: float):
        self._places = asyncio.Semaphore(places)
        self._deadline = deadline

    async def spend(self, ask: Callable[[], Awaitable[None]]) -> bool:
        """Whether it came to its end in time; where not, it was cancelled or never begun."""
        async with self._places:
            try:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    await ask()
            except TimeoutError:
                return False
        return True


class _ModelLook:
    """The probes of one model's servers."""

    def __init__(self, census: Census, prober: Prober, settings: HealthSettings, budget: _Budget, home: Home | None):
        self.census = census
        self.prober = prober
        self.hidden_size = settings.hidden_size or (home.hidden_size if home is not None else None)
        self._home = home
        self._settings = settings
        self._budget = budget
        self._probed = [self.prober.record(claim) for claim in census.claims]

    async def ask(self) -> None:
        online = [probed for probed in self._probed if probed.is_online]
        if self._settings.level >= Level.INFO:
            await asyncio.gather(*(self._asked(probed, Level.INFO) for probed in online))
        if self._settings.level >= Level.FORWARD:
            answering = [probed for probed in online if probed.info is not None and self._span(probed)[1] > 0]
            self._agree_on_hidden_size(answering)
            if self.hidden_size is not None:
                await self._compute([each for each in answering if not _is(each, "hidden-size-mismatch")])

    async def _asked(self, probed: Probed, level: Level, segments: Sequence[Segment] = ()) -> None:
        async def ask() -> None:
            if level is Level.INFO:
                await self.prober.info(probed)
            else:
                await self._forward(probed, segments)

        known = len(probed.findings)
        try:
            in_time = await self._budget.spend(ask)
        except Exception as error:  # noqa: BLE001  # see below
            # What a stranger does wrong is a PeerError and was dealt with. This one is ours, and says nothing of the
            # server; what was found out about the others holds all the same.
            _log.exception("a probe of %s failed", probed.claim.peer_id)
            probed.found(finding("probe-error", f"{type(error).__name__}: {error}", level=level))
            probed.asked.pop(level, None)
            return
        if not in_time and len(probed.findings) == known:
            probed.asked.pop(level, None)

    def _agree_on_hidden_size(self, answering: Sequence[Probed]) -> None:
        """The one most servers say, unless it is given; those that say another are wrong."""
        sizes = Counter(each.info.hidden_size for each in answering if each.info and each.info.hidden_size)
        if self.hidden_size is None and sizes:
            self.hidden_size = sizes.most_common(1)[0][0]
        for probed in answering:
            said = probed.info.hidden_size if probed.info else None
            if said is not None and said != self.hidden_size:
                text = f"its hidden states have {said} channels, the model's {self.hidden_size}"
                probed.found(finding("hidden-size-mismatch", text))
                probed.asked[Level.INFO] = False

    async def _compute(self, answering: Sequence[Probed]) -> None:
        held = [self._span(each) for each in answering]
        if self._home is not None:
            held.append(self._home.span)
        segments = segments_of(held)
        holders = [sum(_within(segment, span) for span in held) for segment in segments]
        votes = {segment: self._votes(segment) for segment, count in zip(segments, holders, strict=True) if count > 1}
        self._ballots = votes
        await asyncio.gather(
            *(
                self._asked(probed, Level.FORWARD, shared_segments(self._span(probed), segments, holders))
                for probed in answering
            )
        )
        for segment, ballot in votes.items():
            if self._home is not None and _within(segment, self._home.span):
                await self._hold_against_home(self._home, segment, ballot)
            else:
                self._hold_against_others(segment, ballot)

    def _votes(self, segment: Segment) -> Votes:
        question = canary_for(segment, self.hidden_size or 1, self._settings.canary_positions)
        return Votes(question, segment[1] - segment[0])

    async def _forward(self, probed: Probed, segments: Sequence[Segment]) -> None:
        size = self.hidden_size or 1
        span = self._span(probed)
        whole = await self.prober.forward(probed, size)
        if whole is None:
            return
        for segment in segments:
            hidden = whole if segment == span else await self.prober.part(probed, segment, size)
            if hidden is None:
                return
            self._ballots[segment].add(Answered(probed.claim.peer_id, hidden, probed.claim.record.quant_type))
        await self.prober.session(probed)

    async def _hold_against_home(self, home: Home, segment: Segment, ballot: Votes) -> None:
        by_peer = {probed.claim.peer_id: probed for probed in self._probed}
        contradicted = await home.contradicted(segment, ballot)
        for peer_id in ballot.voters():
            by_peer[peer_id].compared += segment[1] - segment[0]
        for peer_id, apart in contradicted.items():
            text = f"blocks {segment[0]}:{segment[1]} at home give another answer (difference {apart:.2g})"
            self._failed(by_peer[peer_id], finding("disagrees-with-home", text))

    def _hold_against_others(self, segment: Segment, ballot: Votes) -> None:
        by_peer = {probed.claim.peer_id: probed for probed in self._probed}
        voters = ballot.voters()
        blocks = f"{segment[0]}:{segment[1]}"
        for peer_id in voters if len(voters) > 1 else ():
            by_peer[peer_id].compared += segment[1] - segment[0]
        for peer_id, others in ballot.outvoted().items():
            text = f"blocks {blocks}: {others} of {len(voters)} servers agree on another answer (difference "
            self._failed(by_peer[peer_id], finding("disagrees-with-replica", f"{text}{ballot.apart:.2g})"))
        for peer_id in ballot.disputed():
            text = f"blocks {blocks}: {len(voters)} servers give {len(ballot.camps)} answers (difference "
            self._failed(by_peer[peer_id], finding("disputed", f"{text}{ballot.apart:.2g})"))

    def _failed(self, probed: Probed, found: Finding) -> None:
        if not _is(probed, found.name):  # once is enough, however many segments show it
            probed.found(found)
        probed.asked[Level.FORWARD] = False

    def _span(self, probed: Probed) -> Segment:
        """What there is of its span in the model; (0, 0) where there is nothing."""
        end = min(probed.claim.end, self.census.model.num_blocks)
        return (probed.claim.start, end) if probed.claim.start < end else (0, 0)

    @property
    def has_usable_route(self) -> bool:
        servers = [probed.result(self._settings) for probed in self._probed]
        usable = {Verdict.HEALTHY, Verdict.DEGRADED, Verdict.UNKNOWN}
        return not rules.missing_spans(rules.replicas(self.census.model.num_blocks, servers, usable))

    def result(self, route: "RouteTimes | Finding | None") -> ModelHealth:
        model, settings = self.census.model, self._settings
        servers = tuple(probed.result(settings) for probed in self._probed)
        not_broken = {Verdict.HEALTHY, Verdict.DEGRADED, Verdict.UNKNOWN}
        replicas = rules.replicas(model.num_blocks, servers, not_broken)
        claimed = rules.replicas(model.num_blocks, servers, set(Verdict))
        missing = rules.missing_spans(replicas)
        findings = tuple(self._own_findings(replicas, missing, route))
        tried = not isinstance(route, Finding) and route is not None
        verdict, why = rules.of_model(model.num_blocks, servers, findings, settings.level, tried)
        answering = [server for server in servers if server.seen == "answers"]
        times = route if not isinstance(route, Finding) else None
        return ModelHealth(
            name=model.prefix,
            repository=model.repository,
            num_blocks=model.num_blocks,
            level=settings.level,
            verdict=verdict,
            why=why,
            replicas=replicas,
            claimed=claimed,
            missing=missing,
            has_route=None
            if settings.level < Level.INFO
            else model.num_blocks > 0
            and not rules.missing_spans(rules.replicas(model.num_blocks, answering, not_broken)),
            route_seconds=times.seconds if times else None,
            route_tokens_per_second=times.tokens_per_second if times else None,
            servers=servers,
            findings=findings,
        )

    def _own_findings(
        self, replicas: Sequence[int], missing: Sequence[Segment], route: "RouteTimes | Finding | None"
    ) -> list[Finding]:
        found: list[Finding] = []
        if not self.census.claims:
            found.append(finding("not-announced", f"nobody announces {self.census.model.prefix!r}"))
        elif missing:
            found.append(finding("missing-blocks", f"no usable server holds blocks {rules.covering(missing)}"))
        least = self._settings.min_replicas
        thin = [block for block, count in enumerate(replicas) if 0 < count < least]
        if thin:
            spans = rules.covering(rules.missing_spans([0 if block in thin else 1 for block in range(len(replicas))]))
            found.append(finding("thin-blocks", f"blocks {spans} have fewer than {least} servers"))
        if self.census.malformed:
            found.append(finding("malformed-records", f"{self.census.malformed} records cannot be read"))
        if isinstance(route, Finding):
            found.append(route)
        return found


def _within(segment: Segment, span: Segment) -> bool:
    return span[0] <= segment[0] and segment[1] <= span[1]


def _is(probed: Probed, name: str) -> bool:
    return any(each.name == name for each in probed.findings)
