"""The exporter over HTTP, its history, and the script for cron."""

import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from petals_eval.errors import ConfigError, MachineError, SwarmUnreachableError
from petals_eval.health import HealthReport, HealthSettings, Verdict
from petals_eval.health.history import DAY, History
from petals_eval.health.live import RouteTimes
from petals_eval.health.serving import HealthServer, Monitor, address_of, serve_health
from tests.support.fake_health import FakeServer, FakeSwarm, report_on
from tests.support.fake_swarm import PEER

ROOT = Path(__file__).resolve().parents[2]


def clean() -> HealthReport:
    swarm = FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2))
    return replace(report_on(swarm, level="route", route=RouteTimes(0.1, 10.0)), time=time.time())


def broken() -> HealthReport:
    return replace(report_on(FakeSwarm(4, b=FakeServer(0, 2))), time=time.time())


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
    one = Site(clean(), broken(), SwarmUnreachableError("no initial peer answered"), clean())
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_page_state_and_metrics_follow_the_looks(site: Site) -> None:
    assert "under way" in site.get("/")[2] and site.value("petals_swarm_up") == 0
    assert json.loads(site.get("/api/v1/state")[2]) == {
        "schema_version": 1,
        "verdict": "unknown",
        "error": None,
        "report": None,
    }
    site.monitor.look()
    status, kind, text = site.get("/")
    assert (status, kind) == (200, "text/html; charset=utf-8") and "✓</span> healthy" in text
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
    assert "lowest 66.6% (block 2)" in site.get("/")[2]  # of three looks that reached it, one found nobody
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


def test_uptime_survives_a_restart_and_forgets_after_a_day(tmp_path: Path) -> None:
    file = tmp_path / "health.sqlite"
    now = 10 * DAY
    past = History(file)
    past.add(replace(broken(), time=now - 2 * DAY))
    past.add(replace(broken(), time=now - 0.9 * DAY))
    past.add(replace(clean(), time=now - 60))
    past.add_failure(now - 30)
    past.close()
    again = History(file)
    uptime = again.uptime("tiny", 4, now)
    assert uptime.blocks == (1.0, 1.0, 0.5, 0.5) and uptime.looks == 3
    assert uptime.slots[-1] is Verdict.UNKNOWN and uptime.slots[4] is Verdict.BROKEN and uptime.slots[20] is None
    again.add(replace(clean(), time=now + 20 * DAY))
    assert again.uptime("tiny", 4, now).looks == 0
    again.close()


def test_a_history_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database " * 200)
    with pytest.raises(MachineError, match="--history"):
        History(tmp_path / "file")


FAKE = """#!/bin/sh
cat "{folder}/json"
exit $(cat "{folder}/code")
"""


@pytest.fixture
def cron(tmp_path: Path):
    """healthcheck.sh with a stand-in for the command, and mail that is kept in a file."""
    command, mail = tmp_path / "petals-eval", tmp_path / "mail"
    command.write_text(FAKE.format(folder=tmp_path))
    mail.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/fail ] && exit 1\necho "$2" >> {tmp_path}/sent\ncat > {tmp_path}/body\n'
    )
    command.chmod(0o755)
    mail.chmod(0o755)

    def look(report: HealthReport | None, **environment: str) -> tuple[int, list[str]]:
        (tmp_path / "json").write_text("" if report is None else json.dumps(report.to_json()))
        (tmp_path / "code").write_text(str(3 if report is None else report.exit_code))
        (tmp_path / "sent").unlink(missing_ok=True)
        own = {"PETALS_EVAL": str(command), "HEALTH_STATE": str(tmp_path / "state"), "HEALTH_MAIL_COMMAND": str(mail)}
        outcome = subprocess.run(
            [ROOT / "scripts/healthcheck.sh", "--initial-peers", PEER],
            env={**os.environ, **own, **({"HEALTH_MAIL": "me@example.org"} | environment)},
            timeout=60,
        )
        sent = tmp_path / "sent"
        return outcome.returncode, sent.read_text().splitlines() if sent.exists() else []

    return look


def test_cron_tells_of_changes_only(cron, tmp_path: Path) -> None:
    code, sent = cron(clean())
    assert code == 0 and len(sent) == 1 and "none -> healthy" in sent[0]
    assert cron(clean()) == (0, [])
    code, sent = cron(broken())
    assert code == 3 and "healthy -> broken" in sent[0]
    assert cron(broken()) == (3, [])
    (tmp_path / "fail").touch()
    assert cron(clean()) == (0, [])
    (tmp_path / "fail").unlink()
    code, sent = cron(clean())
    assert "broken -> healthy" in sent[0]  # told at the next look, not lost
    assert "healthy -> unreachable" in cron(None)[1][0]
    unknown = report_on(FakeSwarm(4, a=FakeServer(0, 4)), level="info")
    assert "unreachable -> unknown" in cron(unknown)[1][0]


def test_cron_posts_json_to_a_webhook(cron) -> None:
    posted: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            if b"100-continue" in head.lower():
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(body) < length:
                body += connection.recv(65536)
            posted.append(body)
            connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/hook"
        assert cron(broken(), HEALTH_WEBHOOK=url, HEALTH_MAIL="", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1") == (3, [])
        thread.join(30)
    message = json.loads(posted[0])
    assert (message["verdict"], message["before"], message["exit_code"]) == ("broken", "none", 3)
    assert message["report"]["models"][0]["missing"] == [[2, 4]] and "none -> broken" in message["text"]
