"""Schedules of faults over evaluations of a simulated swarm, drawn by a seed, and what must come of each of them.

As in `tests/chaos`, over real servers: with somebody well left for every block an evaluation ends as if nothing had
happened; with nobody left it stops with a reason by its deadline, and goes on when the servers are well again.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.faults.schedule import Activation, Schedule
from petals_eval.local_swarm.network import LinkProfile
from petals_eval.simulator.scenario import Load, Move, Scenario, Server
from petals_eval.simulator.simulation import Evaluated, SimulatedSwarm
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.span import Span

__all__ = ["MIN_MICRO_BATCHES", "FaultRun", "Planned", "draw_schedule", "run_schedule"]

HOPS, REPLICAS, BLOCKS = 3, 3, 6
MIN_MICRO_BATCHES = 40
LYING = (f.FlippedBit, f.Noise, f.OtherWeights, f.Swapped, f.TrainingMode)
"""Answers that look right. A third replica is needed to say who is wrong, so that they hit one of three at most."""
SILENCING = (f.Crash, f.Hang, f.InfoOnly, f.Reset, f.StaleRecord, f.Truncated, f.Oversized, f.WrongShape, f.WrongDtype)
"""With which no server of a block gives an answer that counts."""
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class Planned:
    """A schedule. nobody: no server of some blocks is left from some moment on. lies: some server lies."""

    scenario: Scenario
    nobody: bool
    lies: bool


@dataclass(frozen=True)
class FaultRun:
    """What came of a schedule.

    evaluated: all rows; where nobody was left, `resumed` has the rest of them. in_flight: calls under way that were
    hit. attempts: schedules drawn until one had hit some.
    """

    seed: int
    planned: Planned
    evaluated: Evaluated
    resumed: Evaluated | None
    in_flight: int
    attempts: int

    @property
    def last(self) -> Evaluated:
        """The evaluation that had to end well."""
        return self.resumed or self.evaluated

    @property
    def late(self) -> int:
        """Waits beyond what they may take, in all evaluations."""
        return self.evaluated.late + (0 if self.resumed is None else self.resumed.late)

    @property
    def wrong(self) -> list[str]:
        """What was not as it must be; nothing where all was."""
        last = self.last
        counts = {"lost": last.lost, "doubled": last.doubled, "different": last.different, "late": self.late}
        found = [f"{count} {name}" for name, count in counts.items() if count]
        if last.stopped is not None:
            found.append(f"stopped: {last.stopped}")
        micro_batches = self.evaluated.micro_batches + (0 if self.resumed is None else self.resumed.micro_batches)
        if micro_batches < MIN_MICRO_BATCHES:
            found.append(f"{micro_batches} micro-batches, expected {MIN_MICRO_BATCHES}")
        if not self.in_flight:
            found.append("no call under way was hit")
        return found


def run_schedule(seed: int) -> FaultRun:
    """Run the schedule of a seed; drawn again while it hit no call under way."""
    found = _run(seed, 0)
    while not found.in_flight and not found.wrong[:-1] and found.attempts < _MAX_ATTEMPTS:
        found = _run(seed, found.attempts)
    return found


def _run(seed: int, attempt: int) -> FaultRun:
    planned = draw_schedule(seed, attempt)

    async def through(runtime: Runtime) -> tuple[Evaluated, Evaluated | None, int]:
        async with SimulatedSwarm(planned.scenario, runtime).running() as swarm:
            evaluated, resumed = await swarm.evaluate(), None
            if planned.nobody and evaluated.stopped is not None:
                swarm.make_well()
                resumed = await swarm.evaluate(resume=True)
            return evaluated, resumed, swarm.in_flight

    (evaluated, resumed, in_flight), _ = run_in_virtual_time(through, seed=planned.scenario.seed)
    return FaultRun(seed, planned, evaluated, resumed, in_flight, attempt + 1)


def draw_schedule(seed: int, attempt: int = 0) -> Planned:
    """Return the schedule of this seed: three hops, three servers each, and one to four things that happen to them."""
    draws = Random(f"petals-eval simulated faults {seed} {attempt}")
    nobody = seed % 8 == 7
    servers = [_drawn_server(draws, hop) for hop in range(HOPS) for _ in range(REPLICAS)]
    settings = _drawn_settings(draws)
    faults, lies = [], False
    if nobody:
        hop, kind = draws.randrange(HOPS), draws.choice(SILENCING)
        at = draws.uniform(0.3, 2.0)
        for server in range(REPLICAS * hop, REPLICAS * (hop + 1)):
            hopeless = {"share": 1.0, "after": 0}
            fault = _drawn_fault(draws, kind, server).fault.model_copy(update=hopeless)
            faults.append(Activation(at=at + draws.uniform(0, 0.2), server=server, fault=fault))
    else:
        for hop in range(HOPS):
            victims = [REPLICAS * hop + each for each in draws.sample(range(REPLICAS), draws.choice((0, 1, 1, 2)))]
            if hop == 0 and not victims:
                victims = [draws.randrange(REPLICAS)]
            for victim in victims:
                if draws.random() < 0.3:
                    servers[victim] = servers[victim].model_copy(update=_drawn_change(draws))
                    continue
                kinds = [
                    kind for kind in f.FAULTS if kind not in LYING or (len(victims) == 1 and not settings.get("wire"))
                ]
                drawn = _drawn_fault(draws, draws.choice(kinds), victim)
                lies = lies or isinstance(drawn.fault, LYING)
                faults.append(drawn)
    if lies:
        settings["verify"] = 1.0
    scenario = Scenario(
        blocks=BLOCKS,
        hidden_size=64,
        dtype="float32" if lies else draws.choice(("float32", "bfloat16")),
        rows=56,
        tokens=(18, 40),
        tokens_per_micro_batch=40,
        servers=tuple(servers),
        clients=draws.choice((1, 1, 1, 1, 2)),
        settings=settings,
        announce_seconds=draws.choice((5.0, 60.0)),
        faults=tuple(faults),
        seed=draws.randrange(2**31),
    )
    return Planned(scenario, nobody, lies)


def _drawn_server(draws: Random, hop: int) -> Server:
    mbps = draws.choice((None, 5.0, 20.0, 100.0))
    return Server(
        blocks=Span(hop * BLOCKS // HOPS, (hop + 1) * BLOCKS // HOPS),
        link=LinkProfile(draws.uniform(0.001, 0.1), draws.choice((0.0, 0.01)), mbps, mbps),
        tokens_per_second=draws.uniform(200, 2000),
        max_tokens=draws.choice((8192, 8192, 8192, 16)),
        cache_tokens=draws.choice((1 << 20, 1 << 20, 400)),
        record_delay=draws.choice((0.0, 0.0, 3.0)),
    )


def _drawn_settings(draws: Random) -> dict[str, Any]:
    settings: dict[str, Any] = {"push": draws.choice(("auto", "auto", "never", "always")), "deadline": 120.0}
    if draws.random() < 0.5:
        settings |= {"request_timeout": 5.0, "connect_timeout": 3.0, "min_backoff": 0.2, "max_backoff": 2.0}
        settings |= {"update_period": 2.0, "missing_update_period": 0.5}
    if draws.random() < 0.15:
        settings["wire"] = draws.choice(("float16", "blockwise8"))
    if draws.random() < 0.1:
        settings["window"] = 12
    return settings


def _drawn_fault(draws: Random, kind: type[f.Fault], server: int) -> Activation:
    """Return a fault as the stub's schedules draw it."""
    seed = draws.randrange(2**31)
    return Schedule.draw(seed, servers=[server], num_blocks=BLOCKS, kinds=[kind], within=2.0).activations[0]


def _drawn_change(draws: Random) -> dict[str, Any]:
    """Return what else may happen to a server: it leaves, comes back, comes late, moves, or others use it."""
    at = draws.uniform(0.1, 2.0)
    start = draws.randrange(BLOCKS)
    return draws.choice(
        (
            {"leaves": at},
            {"leaves": at, "returns": at + draws.uniform(0.1, 5.0)},
            {"joins": at},
            {"moves": (Move(at=at, blocks=Span(start, draws.randint(start + 1, BLOCKS))),)},
            {"load": (Load(since=at, until=at + 60, share=draws.uniform(0.3, 0.9)),)},
        )
    )
