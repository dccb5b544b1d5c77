"""A whole benchmark: every case of the sweep on one swarm, told as it comes."""

import contextlib
from collections.abc import Callable, Iterator

from petals_eval.bench.forward import forward_cases, measure_forward
from petals_eval.bench.inference import inference_cases, measure_inference
from petals_eval.bench.outcome import (
    Case,
    Failure,
    Outcome,
    describe,
    failure_text,
    forward_header,
    forward_row,
    inference_header,
    inference_row,
    servers_table,
)
from petals_eval.bench.settings import BenchSettings, ForwardSettings, InferenceSettings
from petals_eval.bench.target import BenchTarget, open_target, with_wire
from petals_eval.errors import RequestTooLargeError, SwarmError
from petals_eval.report import printable

__all__ = ["bench_forward", "bench_inference"]

# Settings that go into the JSON: neither addresses nor tokens.
_TOLD = {
    *("local_swarm", "delay", "rate", "require_dtype", "require_quant", "active_adapter"),
    *("lengths", "batches", "windows", "wires", "repeats", "prompts", "seconds", "warm_up", "new_tokens"),
}


def bench_forward(settings: ForwardSettings, say: Callable[[str], object]) -> Outcome:
    """Measure micro-batches in flight on the swarm of the settings.

    say: gets each line of the table as soon as it is known. A case that the swarm cannot compute (too long, say) is
    noted and the next one is tried. Raises ModelError, ConfigError, SwarmUnreachableError, and SwarmError when no case
    could be computed.
    """
    with open_target(settings) as target:
        found = _empty("forward", target, settings)
        say(forward_header())
        for wire in settings.wires:
            with with_wire(target, wire) as connected:
                for case in forward_cases(settings, wire):
                    with _noted(found, case, say):
                        point = measure_forward(connected, case, settings)
                        found.points.append(point)
                        say(forward_row(point))
        return _summed_up(found, say)


def bench_inference(settings: InferenceSettings, say: Callable[[str], object]) -> Outcome:
    """Measure inference sessions on the swarm of the settings; otherwise as `bench_forward`."""
    with open_target(settings) as target:
        found = _empty("inference", target, settings)
        say(inference_header())
        for case in inference_cases(settings):
            with _noted(found, case, say):
                point = measure_inference(target, case, settings)
                found.points.append(point)
                say(inference_row(point))
        return _summed_up(found, say)


def _empty(kind: str, target: BenchTarget, settings: BenchSettings) -> Outcome:
    servers = target.blocks.snapshot.servers.values()
    return Outcome(
        kind,
        target.model,
        servers={server.peer_id: str(server.span) for server in servers},
        settings=settings.model_dump(mode="json", include=_TOLD & set(type(settings).model_fields)),
    )


@contextlib.contextmanager
def _noted(found: Outcome, case: Case, say: Callable[[str], object]) -> Iterator[None]:
    """Note a case that the swarm cannot compute, and let the sweep go on to the next one."""
    try:
        yield
    except (RequestTooLargeError, SwarmError) as error:
        reason = printable(str(error))
        found.failures.append(Failure(case, reason))
        say(failure_text(case, reason))


def _summed_up(found: Outcome, say: Callable[[str], object]) -> Outcome:
    """Return the outcome, and tell what each server did in the case that was fastest."""
    if not found.points:
        raise SwarmError("no case could be measured: " + found.failures[-1].reason)
    best = max(found.points, key=lambda point: point.tokens.median)
    say("")
    say(f"the fastest, {describe(best.case)}:")
    for line in servers_table(best.watched, found.servers):
        say(line)
    return found
