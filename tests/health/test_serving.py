"""The exporter over HTTP."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from petals_eval.errors import ConfigError, MachineError, SwarmUnreachableError
from petals_eval.health import HealthReport, HealthSettings
from petals_eval.health.history import History
from petals_eval.health.serving import HealthServer, Monitor, address_of, serve_health
from tests.support.fake_health import (
    broken_report,
    clean_report,
)
from tests.support.fake_swarm import PEER


class Looks:
    """One outcome after the other; the last one again and again."""

    def __init__(self, *outcomes: HealthReport | Exception):
        self.outcomes = list(outcomes)

    def __call__(self, settings: HealthSettings) -> HealthReport:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Site:
    def __init__(self, *outcomes: HealthReport | Exception, every: float = 60.0):
        self.said: list[str] = []
        settings = HealthSettings(initial_peers=(PEER,))
        self.monitor = Monitor(settings, every, History(None), self.said.append, Looks(*outcomes))
        self.server = HealthServer(("127.0.0.1", 0), self.monitor)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        url = f"http://127.0.0.1:{self.server.server_address[1]}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()

    def value(self, name: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics")[2])
        return next(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site(clean_report(), broken_report(), SwarmUnreachableError("no initial peer answered"), clean_report())
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_page_state_and_metrics_follow_the_looks(site: Site) -> None:
    assert "under way" in site.get("/")[2] and site.value("petals_swarm_up") == 0
    state = json.loads(site.get("/api/v1/state")[2])
    assert 0 <= state.pop("looking_seconds") < 60
    assert state == {"schema_version": 1, "verdict": "unknown", "error": None, "looks": 0, "report": None}
    site.monitor.look()
    status, kind, text = site.get("/")
    assert (status, kind) == (200, "text/html; charset=utf-8") and "✓</span> healthy" in text
    assert "One look" in text
    assert json.loads(site.get("/api/v1/state")[2])["report"]["models"][0]["name"] == "tiny"
    assert site.value("petals_swarm_up") == 1

    site.monitor.look()
    assert json.loads(site.get("/api/v1/state")[2])["verdict"] == "broken"
    assert site.value("petals_model_verdict_changes_total") == 1
    assert any("healthy -> broken" in line for line in site.said)

    site.monitor.look()
    state = json.loads(site.get("/api/v1/state")[2])
    assert (state["verdict"], state["error"]) == ("unknown", "no initial peer answered")
    assert state["report"]["verdict"] == "broken"  # what was seen last
    assert "did not reach the swarm" in site.get("/")[2] and site.value("petals_swarm_up") == 0
    assert "petals_model_verdict{" not in site.get("/metrics")[2]  # stale words are no measurement
    assert site.value("petals_health_look_failures_total") == 1

    site.monitor.look()
    text = site.get("/")[2]
    assert "lowest 66.6% (block 2)" in text  # of three looks that reached it, one found nobody
    assert re.search(r"Looked 4 times in [\d.]+ m?s\.", text) and re.search(r"uptime over [\d.]+ m?s \(4 looks\)", text)
    assert site.get("/api/prometheus")[2].startswith("# HELP petals_swarm_up")
    assert site.get("/metrics")[1].startswith("text/plain; version=")


def test_other_paths_and_methods(site: Site) -> None:
    assert site.get("/../etc/passwd")[0] == 404
    assert site.get("/", "POST")[0] == 501
    status, _, body = site.get("/metrics", "HEAD")
    assert (status, body) == (200, "")


def test_it_says_of_itself_whether_it_still_looks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.get("/healthz")[:1] == (200,)
    site.monitor._ended -= 10_000
    assert site.get("/healthz")[0] == 503
    site.monitor.look()
    assert site.get("/healthz")[0] == 200


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert address_of(":9090") == ("127.0.0.1", 9090)
    assert address_of("0.0.0.0:9090") == ("0.0.0.0", 9090)
    for wrong in ("9090", ":port", ":99999", "localhost"):
        with pytest.raises(ConfigError, match="expected"):
            address_of(wrong)


def test_a_port_in_use_is_this_machines_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = HealthSettings(initial_peers=(PEER,))
        with pytest.raises(MachineError, match="cannot listen"):
            serve_health(settings, f":{taken.getsockname()[1]}", 60.0, None, print)
