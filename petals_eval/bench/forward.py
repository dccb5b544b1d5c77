"""The forward benchmark: micro-batches of one shape, as many in flight as the window allows."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch

from petals_eval.bench.monitor import ResourceMonitor, ResourceUse
from petals_eval.bench.settings import ForwardSettings, Wire
from petals_eval.bench.statistics import Spread, percentile
from petals_eval.bench.target import BenchTarget
from petals_eval.errors import SwarmError

__all__ = ["ForwardCase", "ForwardPoint", "forward_cases", "measure_forward"]


@dataclass(frozen=True, slots=True)
class ForwardCase:
    """Micro-batches of `batch` rows of `length` positions; `window` of them in flight, None: as the client chooses."""

    length: int
    batch: int
    window: int | None
    wire: Wire


@dataclass(frozen=True, slots=True)
class ForwardPoint:
    """What was measured of a case, over all its runs.

    tokens, rows: per second, of each run; filling and draining the pipeline is in it.
    latency: seconds from when a micro-batch is handed over until it is back: percentiles 50, 90 and 99.
    watched: the run with the median rate.
    """

    case: ForwardCase
    tokens: Spread
    rows: Spread
    latency: tuple[float, float, float]
    micro_batches: int
    watched: ResourceUse


def forward_cases(settings: ForwardSettings, wire: Wire) -> Iterator[ForwardCase]:
    """Yield every combination over one wire, the shortest first."""
    for length in settings.lengths:
        for batch in settings.batches:
            for window in settings.windows:
                yield ForwardCase(length, batch, window, wire)


def measure_forward(target: BenchTarget, case: ForwardCase, settings: ForwardSettings) -> ForwardPoint:
    """Warm up, then run `settings.repeats` times. Raises SwarmError and CallerError where the swarm cannot.

    SwarmError also where a server does not take the wire's code: it would be measured lossless under the code's name.
    """
    generator = torch.Generator().manual_seed(0)
    shape = case.batch, case.length, target.hidden_size
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    prompts = random_prompts(target, min(settings.prompts, case.length), generator)
    if settings.warm_up > 0:
        _run(target, case, hidden, prompts, settings.warm_up)
    runs = []
    for _ in range(settings.repeats):
        with ResourceMonitor(target) as monitor:
            latencies = _run(target, case, hidden, prompts, settings.seconds)
        runs.append((monitor.result(), latencies))
    for peer in target.blocks.peers.values():
        if peer.codec_refusal is not None:
            raise SwarmError(f"server {peer.name} does not take {case.wire}: {peer.codec_refusal}")
    rates = [len(latencies) * case.batch / watched.seconds for watched, latencies in runs]
    every = [seconds for _, latencies in runs for seconds in latencies]
    middle = sorted(range(len(runs)), key=lambda index: rates[index])[len(runs) // 2]
    return ForwardPoint(
        case,
        tokens=Spread.of([rate * case.length for rate in rates]),
        rows=Spread.of(rates),
        latency=(percentile(every, 50), percentile(every, 90), percentile(every, 99)),
        micro_batches=len(every),
        watched=runs[middle][0],
    )


def random_prompts(target: BenchTarget, tokens: int, generator: torch.Generator) -> torch.Tensor | None:
    """Return deep prompts (blocks, 1, tokens, hidden) that change little; None for no tokens."""
    if tokens == 0:
        return None
    shape = len(target.blocks), 1, tokens, target.hidden_size
    return 0.01 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _run(
    target: BenchTarget, case: ForwardCase, hidden: torch.Tensor, prompts: torch.Tensor | None, seconds: float
) -> list[float]:
    """Send micro-batches for `seconds`, at least one, wait for them all, and return the latency of each."""
    from petals_eval.swarm import Work

    end = time.perf_counter() + seconds
    handed_over: dict[int, float] = {}

    def work() -> Iterator[Work[int]]:
        for number in count():
            if number > 0 and time.perf_counter() >= end:
                return
            handed_over[number] = time.perf_counter()
            yield Work(number, hidden, prompts)

    return [
        time.perf_counter() - handed_over[computed.tag] for computed in target.blocks.stream(work(), window=case.window)
    ]
