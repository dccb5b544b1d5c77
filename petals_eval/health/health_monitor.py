"""The metrics of the Petals health monitor (health.petals.dev), for dashboards and alerts that were made for it.

Names, labels and meanings are those of `metrics.py` in https://github.com/petals-infra/health.petals.dev (30d00fb), and
follow no convention of Prometheus. Servers that have said goodbye are not in a report: the state "offline" is always 0.
A server counts as "unreachable" where rpc_info brought no answer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client.core import GaugeMetricFamily, Metric

from petals_eval.health.results import HealthReport, ModelHealth, ServerHealth

__all__ = ["health_monitor_metrics"]

_STATES = ("online", "joining", "offline", "unreachable")
_PERCENTILES = (25, 50, 75, 90, 95)


def health_monitor_metrics(report: HealthReport) -> Iterator[Metric]:
    """Yield what the health monitor would say of such a swarm."""
    yield GaugeMetricFamily("update_duration", "Seconds that the last look took.", value=report.seconds)
    yield from _of_servers([server for model in report.models for server in model.servers])
    yield from _of_models(report.models)


def _of_servers(servers: Sequence[ServerHealth]) -> Iterator[Metric]:
    pinging = [server.next_pings for server in servers if server.next_pings is not None]
    pings = [seconds for each in pinging for seconds in each.values()]
    answered = [seconds for seconds in pings if seconds is not None]
    if answered:
        yield GaugeMetricFamily(
            "peers_per_srv", "Servers that a server pings, on average.", value=len(pings) / len(pinging)
        )
        lost = (len(pings) - len(answered)) / len(pings)
        yield GaugeMetricFamily("pings_inf_share", "Share of pings without an answer.", value=lost)
    yield GaugeMetricFamily("servers_num_total", "Servers that announce pings.", value=len(pinging))
    relayed = sum(server.using_relay is True for server in servers)
    yield GaugeMetricFamily("servers_num_relay", "Servers that are reached by a relay.", value=relayed)
    if answered:
        percentiles = GaugeMetricFamily("ping_pct", "Percentiles of pings, in seconds.", labels=["pct"])
        for percent in _PERCENTILES:
            percentiles.add_metric([str(percent)], float(np.percentile(answered, percent)))
        yield percentiles
    versions = GaugeMetricFamily("server_version", "Servers that announce a version.", labels=["version_number"])
    for version, count in Counter(server.version for server in servers if server.version).items():
        versions.add_metric([version], count)
    yield versions


def _of_models(models: Sequence[ModelHealth]) -> Iterator[Metric]:
    num_blocks = GaugeMetricFamily("n_blocks", "Blocks of a model.", labels=["model"])
    num_servers = GaugeMetricFamily("servers_num", "Servers of a model.", labels=["model"])
    total = GaugeMetricFamily("blocks_total", "Blocks that all servers of a model announce.", labels=["model"])
    least = GaugeMetricFamily("blocks_online_min", "Servers online of the block that has the fewest.", labels=["model"])
    by_state = GaugeMetricFamily("blocks", "Blocks that servers in a state announce.", labels=["model", "state"])
    average = GaugeMetricFamily(
        "rps_avg", "Tokens/s that a block is announced with, on average.", labels=["model", "rps"]
    )
    lowest = GaugeMetricFamily(
        "rps_min", "Tokens/s of the block that is announced with the fewest.", labels=["model", "rps"]
    )
    for model in models:
        held = {state: np.zeros(model.num_blocks) for state in _STATES}
        rates = {kind: np.zeros(model.num_blocks) for kind in ("network", "inference", "forward")}
        for server in model.servers:
            blocks = slice(server.start, min(server.end, model.num_blocks))
            held[_state(server)][blocks] += 1
            with np.errstate(over="ignore"):  # a stranger may claim as much as there are numbers for
                rates["network"][blocks] += server.network_rps or 0.0
                rates["inference"][blocks] += server.inference_rps or 0.0
                rates["forward"][blocks] += server.forward_rps or 0.0
        num_blocks.add_metric([model.name], model.num_blocks)
        num_servers.add_metric([model.name], len(model.servers))
        total.add_metric([model.name], float(sum(each.sum() for each in held.values())))
        least.add_metric([model.name], float(held["online"].min(initial=np.inf if model.num_blocks else 0)))
        for state, counts in held.items():
            by_state.add_metric([model.name, state], float(counts.sum()))
        for kind, rate in rates.items():
            average.add_metric([model.name, kind], float(rate.mean()) if model.num_blocks else 0.0)
            lowest.add_metric([model.name, kind], float(rate.min(initial=np.inf if model.num_blocks else 0)))
    yield from (num_blocks, num_servers, total, least, by_state, average, lowest)


def _state(server: ServerHealth) -> str:
    return "unreachable" if server.seen in ("unreachable", "silent") else server.state
