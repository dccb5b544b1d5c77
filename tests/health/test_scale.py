"""Large swarms, simulated at the seam: no sockets; each call takes 20 ms and answers with a stub server's bytes."""

import importlib.util
import time
from pathlib import Path

from petals_eval.health import Verdict
from petals_eval.swarm.wire.span import Span
from tests.support.fake_health import HIDDEN, FakeServer, FakeSwarm, report_on

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 80


def thousand(**fields: object) -> FakeSwarm:
    servers = {}
    for index in range(1000):
        start = index * 11 % (BLOCKS - 10)
        servers[f"peer{index}"] = FakeServer(start, start + 11, delay=0.02, **fields)
    return FakeSwarm(BLOCKS, **servers)


def test_info_on_a_thousand_servers_is_quick_and_small() -> None:
    """The target is 60 s and 20 MB; at 64 servers at once a thousand take less than 1 s of waiting."""
    started = time.monotonic()
    swarm = thousand()
    report = report_on(swarm, level="info")
    assert time.monotonic() - started < 20
    assert report.traffic.calls == 2000
    assert report.traffic.bytes_sent + report.traffic.bytes_received < 2_000_000
    assert swarm.most_in_flight <= 64
    assert {server.probes["info"] for server in report.models[0].servers} == {"passed"}
    assert report.models[0].has_route and report.verdict is Verdict.UNKNOWN


def test_a_thousand_servers_that_never_answer_end_at_the_time_limit() -> None:
    swarm = thousand()
    for server in swarm.servers.values():
        server.delay = 1000.0
    started = time.monotonic()
    report = report_on(swarm, level="info", time_limit=1.0)
    assert time.monotonic() - started < 10
    assert {server.probes["info"] for server in report.models[0].servers} == {"not asked"}


def test_the_canary_of_a_large_model_stays_below_a_megabyte_a_call() -> None:
    """rpc_forward takes 1 MiB of tensors in one message; 405B has 16,384 channels."""
    from petals_eval.health.canary import canary_for

    for hidden_size in (64, 4096, 8192, 16384):
        canary = canary_for(Span(0, 2), hidden_size, 16)
        assert canary.numel() * 4 <= 2**20
        assert canary.numel() >= 16 * HIDDEN


def test_the_benchmark_of_routing_runs() -> None:
    spec = importlib.util.spec_from_file_location("bench_routing", ROOT / "scripts/bench_routing.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.main(["--servers", "300", "--blocks", "20", "--repeats", "1"])
    assert all(0 < seconds < 5 for seconds in found.values())
    assert found["pick"] < found["next_hop"]
