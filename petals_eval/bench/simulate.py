"""Simulated evaluations: what the client would make of swarms that are described or drawn, and where its time goes."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from petals_eval.bench.plot import busy_plot
from petals_eval.bench.statistics import percentile
from petals_eval.data.yaml_text import read_yaml, resolve_nulls
from petals_eval.errors import ConfigError
from petals_eval.simulator.draws import draw_scenario
from petals_eval.simulator.regimes import REGIMES, regime
from petals_eval.simulator.scenario import Scenario
from petals_eval.simulator.schedules import FaultRun, run_schedule
from petals_eval.simulator.simulation import Evaluated, Simulated, simulate
from petals_eval.text import plural
from petals_eval.validation import explain

__all__ = ["LOOKS", "FaultsOutcome", "SimulateOutcome", "bench_faults", "bench_simulate", "drawn", "read_scenario"]

SCHEMA = 1
LOOKS = 150
"""How often a picture looks at everything, in the time of the floor."""
_SHOWN = 0.05  # what was never busier is left out of a picture


@dataclass(slots=True)
class SimulateOutcome:
    """All that was simulated, by the names of the scenarios."""

    found: dict[str, Simulated] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The scenarios in which a row was lost, doubled or different."""
        return [
            name
            for name, each in self.found.items()
            if any(one.lost or one.doubled or one.different for one in each.evaluations)
        ]

    def plot(self) -> str:
        """Return an SVG picture of how busy everything was that was ever busy, in the first scenario, which was looked
        at."""
        name, found = next(iter(self.found.items()))
        if found.timeline is None:
            raise ValueError("expected a simulation that was looked at")
        busy = {part: shares.tolist() for part, shares in found.timeline.busy.items() if shares.max() >= _SHOWN}
        return busy_plot(f"how busy: {name}", found.timeline.at.tolist(), busy)

    def to_json(self) -> dict[str, Any]:
        """Return plain values. Shares are of the floor; those over all scenarios are of first evaluations."""
        first = [each.shares[0] for each in self.found.values()]
        every = [evaluation for each in self.found.values() for evaluation in each.evaluations]
        return {
            "schema_version": SCHEMA,
            "benchmark": "simulate",
            "scenarios": [
                {
                    "name": name,
                    "floor_seconds": each.floor.seconds,
                    "shares": list(each.shares),
                    "evaluations": [asdict(evaluation) for evaluation in each.evaluations],
                }
                for name, each in self.found.items()
            ],
            "median_share": percentile(first, 50),
            "tenth_percentile_share": percentile(first, 10),
            **{name: sum(getattr(each, name) for each in every) for name in ("lost", "doubled", "different")},
        }


@dataclass(slots=True)
class FaultsOutcome:
    """Schedules of faults. failed: those of which something was not as it must be.

    drawn_again: because they hit no call under way. in_flight: calls under way that were hit.
    lost, doubled, different: rows. late: waits beyond what they may take.
    """

    schedules: int = 0
    failed: list[FaultRun] = field(default_factory=list)
    drawn_again: int = 0
    in_flight: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    late: int = 0
    processor_seconds: float = 0.0

    def add(self, run: FaultRun) -> None:
        """Count a schedule."""
        self.schedules += 1
        self.drawn_again += run.attempts - 1
        self.in_flight += run.in_flight
        self.lost += run.last.lost
        self.doubled += run.last.doubled
        self.different += run.last.different
        self.late += run.late
        if run.wrong:
            self.failed.append(run)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        counts = ("schedules", "drawn_again", "in_flight", "lost", "doubled", "different", "late", "processor_seconds")
        return {
            "schema_version": SCHEMA,
            "benchmark": "simulate --faults",
            **{name: getattr(self, name) for name in counts},
            "failed": [{"seed": run.seed, "wrong": run.wrong} for run in self.failed],
        }


def bench_faults(count: int, seed: int, say: Callable[[str], object]) -> FaultsOutcome:
    """Run the schedules of faults of the seeds from `seed` on, and tell of each that is not as it must be."""
    outcome, began = FaultsOutcome(), time.process_time()
    for each in range(seed, seed + count):
        run = run_schedule(each)
        outcome.add(run)
        if run.wrong:
            say(f"seed {each}: {'; '.join(run.wrong)}")
    outcome.processor_seconds = time.process_time() - began
    schedules = plural(count, "schedule of faults", "schedules of faults")
    say(f"{schedules}: {count - len(outcome.failed)} as they must be, {len(outcome.failed)} not")
    say(
        f"  {outcome.lost} rows lost, {outcome.doubled} doubled, {outcome.different} different; "
        f"{outcome.late} waits too long; {outcome.in_flight} calls under way were hit"
    )
    return outcome


def read_scenario(file: str) -> tuple[str, Scenario]:
    """Return the scenario of a YAML file, or of a regime's name (`petals_eval.simulator.regimes`), and how to call it.

    Raises ConfigError where it is none.
    """
    path = Path(file)
    if file in REGIMES and not path.exists():
        return file, regime(file)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected keys and values")
        return path.name, Scenario.model_validate(resolve_nulls(values, Scenario))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Scenario)}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a YAML file, or one of {', '.join(REGIMES)}; found neither") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def drawn(count: int, seed: int) -> Iterator[tuple[str, Scenario]]:
    """Yield scenarios that are drawn by the seeds from `seed` on, by their names."""
    return ((f"seed {each}", draw_scenario(each)) for each in range(seed, seed + count))


def bench_simulate(
    scenarios: Iterable[tuple[str, Scenario]],
    evaluations: int,
    say: Callable[[str], object],
    *,
    looks: int | None = None,
) -> SimulateOutcome:
    """Simulate each scenario, and tell of it as it comes. There must be at least one.

    looks: how often to look at how busy everything is, in the time of the floor, for `SimulateOutcome.plot`.
    """
    outcome = SimulateOutcome()
    for name, scenario in scenarios:
        outcome.found[name] = found = simulate(scenario, evaluations, looks=looks)
        servers = plural(len(scenario.servers), "server")
        say(f"{name}: {scenario.blocks} blocks on {servers}, {plural(scenario.rows, 'row')}")
        floor = found.floor
        say(f"  floor {floor.seconds:.1f} s: best flow {floor.flow:.1f} s, one pass {floor.one_pass:.1f} s")
        for number, (each, share) in enumerate(zip(found.evaluations, found.shares, strict=True), start=1):
            retries = f"{each.retries} retries{_faults(each)}"
            say(f"  evaluation {number}: {each.seconds:.1f} s, {share:.0%} of the floor, {retries}")
    if len(outcome.found) == 1:
        for line in _parts(scenario, found.evaluations[-1]):
            say(line)
    else:
        told = outcome.to_json()
        median, tenth = told["median_share"], told["tenth_percentile_share"]
        say(f"share of the floor, first evaluations: median {median:.0%}, tenth percentile {tenth:.0%}")
    return outcome


def _faults(each: Evaluated) -> str:
    counts = {"lost": each.lost, "doubled": each.doubled, "different": each.different}
    stopped = "" if each.stopped is None else f"; it {each.stopped}"
    return "".join(f", {count} rows {name}" for name, count in counts.items() if count) + stopped


def _parts(scenario: Scenario, last: Evaluated) -> Iterator[str]:
    """Yield the share of the last evaluation's time for which each part was busy, one line a server."""
    yield f"  {'server':>6} {'blocks':>9} {'computing':>10} {'link up':>8} {'link down':>10}"
    for index, (server, *busy) in enumerate(zip(scenario.servers, last.busy, last.up, last.down, strict=True)):
        computing, up, down = (f"{each:.0%}" for each in busy)
        yield f"  {index:>6} {server.blocks!s:>9} {computing:>10} {up:>8} {down:>10}"
    links = f"link up {last.client_up:.0%}, link down {last.client_down:.0%}"
    yield f"  the client's {links}, processor {last.processor:.0%}"
