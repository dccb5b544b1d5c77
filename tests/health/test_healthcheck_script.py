"""scripts/healthcheck.sh, for cron."""

import json
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from petals_eval.health import HealthReport
from tests.support.fake_health import (
    FakeServer,
    FakeSwarm,
    broken_report,
    clean_report,
    report_on,
)
from tests.support.fake_swarm import PEER

ROOT = Path(__file__).resolve().parents[2]


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

    def look(
        report: HealthReport | str | None, *arguments: str, code: int | None = None, **environment: str
    ) -> tuple[int, list[str]]:
        """report: None leaves none, a text is printed as it is. code: of the command, if not the report's."""
        text = report or "" if isinstance(report, str | None) else json.dumps(report.to_json()) + "\n"
        (tmp_path / "json").write_text(text)
        (tmp_path / "code").write_text(str(getattr(report, "exit_code", 3) if code is None else code))
        (tmp_path / "sent").unlink(missing_ok=True)
        own = {"PETALS_EVAL": str(command), "HEALTH_STATE": str(tmp_path / "state"), "HEALTH_MAIL_COMMAND": str(mail)}
        outcome = subprocess.run(
            [ROOT / "scripts/healthcheck.sh", "--initial-peers", PEER, *arguments],
            env={**os.environ, **own, **({"HEALTH_MAIL": "me@example.org"} | environment)},
            timeout=60,
        )
        sent = tmp_path / "sent"
        return outcome.returncode, sent.read_text().splitlines() if sent.exists() else []

    return look


def test_cron_tells_of_changes_only(cron, tmp_path: Path) -> None:
    code, sent = cron(clean_report())
    assert code == 0 and len(sent) == 1 and "none -> healthy" in sent[0]
    assert cron(clean_report()) == (0, [])
    code, sent = cron(broken_report())
    assert code == 3 and "healthy -> broken" in sent[0]
    assert cron(broken_report()) == (3, [])
    (tmp_path / "fail").touch()
    assert cron(clean_report()) == (0, [])
    (tmp_path / "fail").unlink()
    code, sent = cron(clean_report())
    assert "broken -> healthy" in sent[0]  # told at the next look, not lost
    assert "healthy -> unreachable" in cron(None)[1][0]
    unknown = report_on(FakeSwarm(4, a=FakeServer(0, 4)), level="info")
    assert "unreachable -> unknown" in cron(unknown)[1][0]


def test_nothing_is_healthy_without_a_report(cron, tmp_path: Path) -> None:
    """`--help` ends with 0, too, and a report may be cut, or say something else than the exit code."""
    cut = json.dumps(clean_report().to_json())[:-1]
    for report, code in ((None, 0), (None, 1), ("usage: petals-eval health\n", 0), (cut, 0), (broken_report(), 0)):
        assert cron(report, code=code) == (70, [])
    for unreadable in ("no JSON", json.dumps(broken_report().to_json())[:-9]):
        assert cron(unreadable, code=3) == (70, [])
    named = json.dumps(broken_report().to_json()).replace('"tiny"', '"tiny", "verdict": "healthy"')
    assert cron(named, code=0) == (70, [])
    assert not [path for path in tmp_path.glob("state*") if path.suffix != ".lock"]


def test_help_is_shown_and_no_look_is_taken_that_does_not_end(cron, tmp_path: Path, capfd) -> None:
    assert cron(clean_report(), "--help") == (0, [])
    usage = capfd.readouterr().out
    assert "HEALTH_WEBHOOK        where to POST" in usage and usage.endswith("tries again.\n")
    for flag in ("--watch", "--serve", "--serve=:9090"):
        assert cron(clean_report(), flag) == (2, [])
    assert "looks once" in capfd.readouterr().err
    assert not list(tmp_path.glob("state*"))


def test_each_swarm_has_a_verdict_of_its_own(cron) -> None:
    assert len(cron(clean_report(), "--dht-prefix", "one")[1]) == 1
    assert "none -> broken" in cron(broken_report(), "--dht-prefix", "other")[1][0]
    assert cron(clean_report(), "--dht-prefix", "one") == (0, [])
    assert cron(broken_report(), "--dht-prefix", "other") == (3, [])


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
        assert cron(
            broken_report(), HEALTH_WEBHOOK=url, HEALTH_MAIL="", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"
        ) == (3, [])
        thread.join(30)
    message = json.loads(posted[0])
    assert (message["verdict"], message["before"], message["exit_code"]) == ("broken", "none", 3)
    assert message["report"]["models"][0]["missing"] == [[2, 4]] and "none -> broken" in message["text"]
