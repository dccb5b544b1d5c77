"""What a benchmark found: as a table for people, as JSON, and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from petals_eval.bench.forward import ForwardCase, ForwardPoint
from petals_eval.bench.inference import InferenceCase, InferencePoint
from petals_eval.bench.monitor import ResourceUse
from petals_eval.bench.plot import line_plot
from petals_eval.swarm.peers.peer_text import short_peer

__all__ = [
    "Case",
    "Failure",
    "Outcome",
    "describe",
    "failure_text",
    "forward_header",
    "forward_row",
    "inference_header",
    "inference_row",
    "servers_table",
]

Point = ForwardPoint | InferencePoint
Case = ForwardCase | InferenceCase

SCHEMA = 1

_CASE = f"{'length':>7} {'batch':>6} {'window':>7} {'wire':>10}"
_AROUND = f"{'link':>5} {'client CPU':>11} {'memory':>8} {'retries':>8}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A case the swarm could not compute, and why."""

    case: Case
    reason: str


@dataclass(slots=True)
class Outcome:
    """All points of a benchmark. kind: "forward" or "inference"; model: its name; servers: blocks by peer id."""

    kind: str
    model: str
    servers: dict[str, str]
    settings: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: names and measurements, never local paths, tokens or addresses."""
        return {
            "schema_version": SCHEMA,
            "benchmark": self.kind,
            "model": self.model,
            "servers": self.servers,
            "settings": self.settings,
            "versions": {name: version(name) for name in ("petals-eval", "hivemind", "torch")},
            "points": [_flat(asdict(point)) for point in self.points],
            "failures": [{**asdict(failure.case), "reason": failure.reason} for failure in self.failures],
        }

    def plot(self) -> str:
        """Return tokens per second over the length as SVG, a line for each of the other settings. It needs a point."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            lines.setdefault(describe(point.case, length=False), []).append((point.case.length, point.tokens.median))
        swept = {name: sorted(points) for name, points in lines.items()}
        title = f"{self.kind}: {self.model}, {len(self.servers)} servers"
        return line_plot(title, "positions of a row", "tokens per second", swept)


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    return {**point.pop("case"), **point}


def describe(case: Case, *, length: bool = True) -> str:
    """Return a case in words."""
    window = "auto" if case.window is None else str(case.window)
    start = f"length {case.length}, " if length else ""
    return f"{start}batch {case.batch}, window {window}" + ("" if case.wire == "lossless" else f", {case.wire}")


def forward_header() -> str:
    """Return the head of the forward table."""
    return f"{_CASE} {'tokens/s: median (range)':>28} {'rows/s':>8} {'ms: 50%':>8} {'90%':>7} {'99%':>7} {_AROUND}"


def forward_row(point: ForwardPoint) -> str:
    latencies = " ".join(f"{1000 * each:{width}.0f}" for each, width in zip(point.latency, (8, 7, 7), strict=True))
    return f"{_case(point.case)} {point.tokens!s:>28} {point.rows.median:>8.1f} {latencies} {_around(point.watched)}"


def inference_header() -> str:
    """Return the head of the inference table."""
    steps = f"{'step, ms: 50%':>14} {'90%':>7} {'99%':>7} {'prompt, ms':>11}"
    return f"{_CASE} {'tokens/s: median (range)':>28} {steps} {_AROUND}"


def inference_row(point: InferencePoint) -> str:
    steps = " ".join(f"{1000 * each:{width}.0f}" for each, width in zip(point.step, (14, 7, 7), strict=True))
    first = 1000 * point.first_step[0]
    return f"{_case(point.case)} {point.tokens!s:>28} {steps} {first:>11.0f} {_around(point.watched)}"


def failure_text(case: Case, reason: str) -> str:
    """Return the row of a combination that was not measured, for either table."""
    return f"{_case(case)} not measured: {reason}"


def servers_table(watched: ResourceUse, spans: Mapping[str, str]) -> Sequence[str]:
    """Return what each server did in a run, one line a server."""
    head = f"{'server':>10} {'blocks':>9} {'share':>6} {'calls':>6} {'MB out':>7} {'MB in':>7}"
    lines = [f"{head} {'busy':>5} {'computing':>10}"]
    for peer, did in sorted(watched.servers.items(), key=lambda each: spans.get(each[0], "")):
        busy, computing = ("" if each is None else f"{each:.0%}" for each in (did.busy, did.processor))
        lines.append(
            f"{short_peer(peer):>10} {spans.get(peer, '?'):>9} {did.share:>6.0%} {did.calls:>6}"
            f" {did.bytes_sent / 1e6:>7.1f} {did.bytes_received / 1e6:>7.1f} {busy:>5} {computing:>10}"
        )
    return lines


def _case(case: Case) -> str:
    window = "auto" if case.window is None else str(case.window)
    return f"{case.length:>7} {case.batch:>6} {window:>7} {case.wire:>10}"


def _around(watched: ResourceUse) -> str:
    link = "" if watched.link_use is None else f"{watched.link_use:.0%}"
    cpu = f"{watched.client_processor / watched.seconds:.0%}"
    return f"{link:>5} {cpu:>11} {watched.client_memory / 2**20:>5.0f} MB {watched.retries:>8}"
