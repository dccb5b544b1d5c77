"""A report as metrics of Prometheus."""

import math
import re

from prometheus_client.parser import text_string_to_metric_families

from petals_eval.errors import PeerTimeoutError
from petals_eval.health import HealthReport
from petals_eval.health.metrics import Tally, exposition
from tests.support.fake_health import EVIL, FakeServer, FakeSwarm, raising, report_on


def test_prometheus_reads_the_metrics_and_finds_their_names_in_order(report: HealthReport) -> None:
    text = exposition(report, Tally(looks=3, failures=1, calls=40, bytes_sent=5, up=True, changes={EVIL: 2})).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {name: family for name, family in families.items() if name.startswith("petals_")}
    assert len(ours) > 20
    for name, family in ours.items():
        assert re.fullmatch(r"petals_[a-z_]+", name) and family.documentation.endswith(".")
        assert not name.endswith(("_ms", "_milliseconds", "_kb", "_count", "_sum", "_total", "_gauge"))
        samples = {sample.name for sample in family.samples}
        assert samples <= ({f"{name}_total"} if family.type == "counter" else {name})
        labels = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(labels) == len(set(labels))
    covered = {s.labels["model"]: s.value for s in families["petals_model_blocks_covered"].samples}
    assert covered == {"tiny": 4.0, EVIL: 4.0}
    verdicts = [s for s in families["petals_model_verdict"].samples if s.labels["model"] == "tiny"]
    assert [s.labels["verdict"] for s in verdicts if s.value] == ["degraded"] and len(verdicts) == 4
    assert families["petals_health_looks"].samples[0].value == 3


def test_what_records_claim_and_who_answers(report: HealthReport) -> None:
    text = exposition(report, Tally()).decode()
    assert 'petals_server_claimed_network_tokens_per_second{model="tiny",peer="a"} 900.0' in text
    assert 'petals_server_claimed_inference_tokens_per_second{model="tiny",peer="a"} 200.0' in text
    assert 'claimed_forward_tokens_per_second{model="tiny",peer="b"}' not in text
    assert 'petals_bootstrap_reachable{address="/ip4/203.0.113.6/tcp/1/p2p/a"} 0.0' in text
    assert 'petals_model_blocks_compared{model="tiny"} 4.0' in text


def test_a_dashboard_of_the_petals_health_monitor_finds_its_names() -> None:
    """Names and labels are those that its metrics.py prints."""
    record = {"network_rps": 900.0, "forward_rps": 5000.0, "next_pings": {"b": 0.1, "c": math.inf, "x": 0.3}}
    servers = {
        "a": FakeServer(0, 4, record={**record, "using_relay": True}),
        "b": FakeServer(0, 2, record={"network_rps": 100.0, "next_pings": {"c": 0.2}}),
        "c": FakeServer(2, 4, info=raising(PeerTimeoutError("no answer within 10 s"))),
        "d": FakeServer(3, 4, state=1, record={"version": None}),
    }
    report = report_on(FakeSwarm(4, **servers))
    text = exposition(report, Tally()).decode()
    lines = {line for line in text.splitlines() if not line.startswith(("#", "petals_"))}
    assert lines == {
        "update_duration 1.0",
        "peers_per_srv 2.0",
        "pings_inf_share 0.25",
        "servers_num_total 2.0",
        "servers_num_relay 1.0",
        'ping_pct{pct="25"} 0.15000000000000002',
        'ping_pct{pct="50"} 0.2',
        'ping_pct{pct="75"} 0.25',
        'ping_pct{pct="90"} 0.28',
        'ping_pct{pct="95"} 0.29',
        'server_version{version_number="2.2.0"} 3.0',
        'n_blocks{model="tiny"} 4.0',
        'servers_num{model="tiny"} 4.0',
        'blocks_total{model="tiny"} 9.0',
        'blocks_online_min{model="tiny"} 1.0',
        'blocks{model="tiny",state="online"} 6.0',
        'blocks{model="tiny",state="joining"} 1.0',
        'blocks{model="tiny",state="offline"} 0.0',
        'blocks{model="tiny",state="unreachable"} 2.0',
        'rps_avg{model="tiny",rps="network"} 950.0',
        'rps_avg{model="tiny",rps="inference"} 0.0',
        'rps_avg{model="tiny",rps="forward"} 5000.0',
        'rps_min{model="tiny",rps="network"} 900.0',
        'rps_min{model="tiny",rps="inference"} 0.0',
        'rps_min{model="tiny",rps="forward"} 5000.0',
    }


def test_claims_beyond_all_numbers_are_still_metrics() -> None:
    servers = {name: FakeServer(0, 99, record={"network_rps": 1.7e308, "next_pings": {"x": 1e308}}) for name in "ab"}
    assert (
        'rps_avg{model="tiny",rps="network"} +Inf' in exposition(report_on(FakeSwarm(4, **servers)), Tally()).decode()
    )
    assert b"n_blocks" in exposition(report_on(FakeSwarm(0)), Tally())


def test_metrics_before_the_first_look() -> None:
    text = exposition(None, Tally()).decode()
    [up] = [family for family in text_string_to_metric_families(text) if family.name == "petals_swarm_up"]
    assert up.samples[0].value == 0
