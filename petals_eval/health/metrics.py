"""A report as Prometheus metrics. Names follow its conventions: base units, `_total` for counters, help for each. Those
of the health monitor of Petals stand beside ours (`health_monitor`).

Peers' words stand in label values only, which prometheus_client escapes; `Finding.name` and verdicts are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from petals_eval.health.health_monitor import health_monitor_metrics
from petals_eval.health.results import HealthReport, ModelHealth, Verdict

__all__ = ["CONTENT_TYPE_LATEST", "Tally", "exposition"]


@dataclass(slots=True)
class Tally:
    """What an exporter counted since it began.

    looks, failures: at the swarm, and those of them that could not reach it. calls, bytes_sent, bytes_received: of all
    looks. changes: of the verdict, by model. up: whether the last look reached the swarm.
    """

    looks: int = 0
    failures: int = 0
    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    up: bool = False


def exposition(report: HealthReport | None, tally: Tally) -> bytes:
    """Return what Prometheus scrapes. report: the last one, or None before the first."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Report(report, tally))
    return generate_latest(registry)


class _Report(Collector):
    def __init__(self, report: HealthReport | None, tally: Tally):
        self._report = report
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        tally = self._tally
        yield GaugeMetricFamily("petals_swarm_up", "Whether the last look reached the swarm.", value=int(tally.up))
        yield CounterMetricFamily("petals_health_looks", "Looks at the swarm.", value=tally.looks)
        yield CounterMetricFamily(
            "petals_health_look_failures", "Looks that could not reach the swarm.", value=tally.failures
        )
        yield CounterMetricFamily("petals_health_calls", "Calls to servers that were answered.", value=tally.calls)
        traffic = CounterMetricFamily(
            "petals_health_message_bytes", "Bytes of messages to and from servers.", labels=["direction"]
        )
        traffic.add_metric(["sent"], tally.bytes_sent)
        traffic.add_metric(["received"], tally.bytes_received)
        yield traffic
        changed = CounterMetricFamily(
            "petals_model_verdict_changes",
            "Looks in which a model's verdict was another than before.",
            labels=["model"],
        )
        for name, count in tally.changes.items():
            changed.add_metric([name], count)
        yield changed
        if self._report is not None:
            yield GaugeMetricFamily(
                "petals_health_last_look_timestamp_seconds", "When the last look began.", value=self._report.time
            )
            yield GaugeMetricFamily(
                "petals_health_last_look_duration_seconds", "How long it took.", value=self._report.seconds
            )
            reachable = GaugeMetricFamily(
                "petals_bootstrap_reachable",
                "Whether an address of a bootstrap peer can be connected to.",
                labels=["address"],
            )
            for peer in self._report.bootstrap:
                if peer.state != "not asked":
                    reachable.add_metric([peer.address], int(peer.state == "reachable"))
            yield reachable
            yield from _models(self._report.models)
            yield from _servers(self._report.models)
            yield from health_monitor_metrics(self._report)


def _models(models: tuple[ModelHealth, ...]) -> Iterator[Metric]:
    verdict = GaugeMetricFamily("petals_model_verdict", "1 for the verdict a model has.", labels=["model", "verdict"])
    blocks = GaugeMetricFamily("petals_model_blocks", "Blocks of a model.", labels=["model"])
    covered = GaugeMetricFamily("petals_model_blocks_covered", "Blocks with a usable server.", labels=["model"])
    compared = GaugeMetricFamily(
        "petals_model_blocks_compared", "Blocks whose answers were held against others.", labels=["model"]
    )
    servers = GaugeMetricFamily("petals_block_servers", "Usable servers of a block.", labels=["model", "block"])
    route = GaugeMetricFamily(
        "petals_model_route_duration_seconds", "Of a canary through all blocks.", labels=["model"]
    )
    found = GaugeMetricFamily(
        "petals_model_findings", "Findings about a model and its servers.", labels=["model", "finding"]
    )
    for model in models:
        for each in Verdict:
            verdict.add_metric([model.name, each.value], int(model.verdict is each))
        blocks.add_metric([model.name], model.num_blocks)
        covered.add_metric([model.name], model.covered)
        compared.add_metric([model.name], sum(stop - start for start, stop in model.compared))
        for block, count in enumerate(model.replicas):
            servers.add_metric([model.name, str(block)], count)
        if model.route_seconds is not None:
            route.add_metric([model.name], model.route_seconds)
        names = [finding.name for _, finding in model.all_findings]
        for name in sorted(set(names)):
            found.add_metric([model.name, name], names.count(name))
    yield from (verdict, blocks, covered, compared, servers, route, found)


def _servers(models: tuple[ModelHealth, ...]) -> Iterator[Metric]:
    labels = ["model", "peer"]
    info = GaugeMetricFamily(
        "petals_server_info", "What a server says of itself.", labels=[*labels, "version", "dtype", "quant", "span"]
    )
    verdict = GaugeMetricFamily("petals_server_verdict", "1 for the verdict a server has.", labels=[*labels, "verdict"])
    trip = GaugeMetricFamily("petals_server_round_trip_seconds", "Of an rpc_info.", labels=labels)
    claimed = GaugeMetricFamily(
        "petals_server_claimed_tokens_per_second", "Throughput that a server claims.", labels=labels
    )
    network = GaugeMetricFamily(
        "petals_server_claimed_network_tokens_per_second", "What its link carries, by its record.", labels=labels
    )
    forward = GaugeMetricFamily(
        "petals_server_claimed_forward_tokens_per_second",
        "One of its blocks in forward calls, by its record.",
        labels=labels,
    )
    inference = GaugeMetricFamily(
        "petals_server_claimed_inference_tokens_per_second",
        "One of its blocks in sessions, by its record.",
        labels=labels,
    )
    measured = GaugeMetricFamily(
        "petals_server_canary_tokens_per_second", "Throughput of one small canary call.", labels=labels
    )
    cache = GaugeMetricFamily("petals_server_cache_tokens_left", "Room for tokens that a server claims.", labels=labels)
    for model in models:
        for server in model.servers:
            values = [model.name, server.peer_id]
            span = f"{server.start}:{server.end}"
            says = [server.version or "", server.dtype or "", server.quant_type or "", span]
            info.add_metric([*values, *says], 1)
            verdict.add_metric([*values, server.verdict.value], 1)
            for family, value in (
                (trip, server.round_trip),
                (claimed, server.throughput),
                (network, server.network_rps),
                (forward, server.forward_rps),
                (inference, server.inference_rps),
                (measured, server.tokens_per_second),
                (cache, server.cache_tokens_left),
            ):
                if value is not None:
                    family.add_metric(values, value)
    yield from (info, verdict, trip, claimed, network, forward, inference, measured, cache)
