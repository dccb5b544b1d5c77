"""The inference benchmark: sessions that read a prompt and then go on, one position a step."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from petals_eval.bench.forward import random_prompts
from petals_eval.bench.monitor import ResourceMonitor, ResourceUse
from petals_eval.bench.settings import InferenceSettings, Wire
from petals_eval.bench.statistics import Spread, percentile
from petals_eval.bench.target import BenchTarget

__all__ = ["InferenceCase", "InferencePoint", "inference_cases", "measure_inference"]


@dataclass(frozen=True, slots=True)
class InferenceCase:
    """`window` sessions at once, each of `batch` rows with a prompt of `length` positions."""

    length: int
    batch: int
    window: int
    wire: Wire


@dataclass(frozen=True, slots=True)
class InferencePoint:
    """What was measured of a case, over all its runs.

    first_step: seconds until the prompt is read, opening the session included: percentiles 50, 90 and 99.
    step: seconds of each later step, likewise. prompt_tokens: positions of prompts per second while these are read.
    tokens: positions per second of all sessions after their prompts. watched: the run with the median rate.
    """

    case: InferenceCase
    first_step: tuple[float, float, float]
    step: tuple[float, float, float]
    prompt_tokens: Spread
    tokens: Spread
    watched: ResourceUse


@dataclass(frozen=True, slots=True)
class _Session:
    """Seconds of one session's steps."""

    first: float
    steps: list[float]


def inference_cases(settings: InferenceSettings) -> Iterator[InferenceCase]:
    """Yield every combination, the shortest first."""
    for wire in settings.wires:
        for length in settings.lengths:
            for batch in settings.batches:
                for window in settings.windows:
                    yield InferenceCase(length, batch, window, wire)


def measure_inference(target: BenchTarget, case: InferenceCase, settings: InferenceSettings) -> InferencePoint:
    """Warm up with one session, then run `settings.repeats` times. Raises SwarmError, CallerError where the swarm
    cannot."""
    generator = torch.Generator().manual_seed(0)
    prompts = random_prompts(target, min(settings.prompts, case.length), generator)
    shape = case.batch, case.length + 1, target.hidden_size
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    _session(target, hidden, prompts, 1)
    runs: list[tuple[ResourceUse, list[_Session]]] = []
    for _ in range(settings.repeats):
        with ResourceMonitor(target) as monitor, ThreadPoolExecutor(case.window) as pool:
            started = [pool.submit(_session, target, hidden, prompts, settings.new_tokens) for _ in range(case.window)]
            sessions = [each.result() for each in started]
        runs.append((monitor.result(), sessions))
    rates = [_rate(sessions, case.batch, len(sessions[0].steps)) for _, sessions in runs]
    firsts = [session.first for _, sessions in runs for session in sessions]
    steps = [seconds for _, sessions in runs for session in sessions for seconds in session.steps]
    middle = sorted(range(len(runs)), key=lambda index: rates[index])[len(runs) // 2]
    prompt_rates = [
        case.window * case.batch * case.length / max(session.first for session in sessions) for _, sessions in runs
    ]
    return InferencePoint(
        case,
        first_step=(percentile(firsts, 50), percentile(firsts, 90), percentile(firsts, 99)),
        step=(percentile(steps, 50), percentile(steps, 90), percentile(steps, 99)),
        prompt_tokens=Spread.of(prompt_rates),
        tokens=Spread.of(rates),
        watched=runs[middle][0],
    )


def _rate(sessions: list[_Session], batch: int, steps: int) -> float:
    """Return the positions per second after the prompts, of sessions side by side."""
    return len(sessions) * batch * steps / max(sum(session.steps) for session in sessions)


def _session(target: BenchTarget, hidden: torch.Tensor, prompts: torch.Tensor | None, new_tokens: int) -> _Session:
    """Run a session. hidden (batch, prompt + 1, hidden): the prompt, and the position that every later step sends."""
    length = hidden.shape[1] - 1
    steps = []
    started = time.perf_counter()
    with target.blocks.inference_session(length + new_tokens, batch=hidden.shape[0]) as session:
        session.step(hidden[:, :length], prompts)
        first = time.perf_counter() - started
        for _ in range(new_tokens):
            step_started = time.perf_counter()
            session.step(hidden[:, length:])
            steps.append(time.perf_counter() - step_started)
    return _Session(first, steps)
