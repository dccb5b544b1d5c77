"""`petals-eval health` as it is typed."""

import json
import re
import shutil
import threading
import time
import urllib.request
from ipaddress import ip_network
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from petals_eval.health import HealthSettings
from tests.cli.conftest import Stage
from tests.cli.invoking import invoke


def test_a_clean_swarm_is_healthy_and_ends_with_0(stage: Stage) -> None:
    outcome = invoke("health", "--initial-peers", stage.peer, "--html", "health.html")
    assert outcome.code == 0
    assert "stories260K-hf   healthy   5/5 blocks, thinnest: block 0 (1 server)" in outcome.out
    assert "0 █████  1 to 1 server a block" in outcome.out
    assert "3 servers, asked up to level route" in outcome.out and outcome.err == "page: health.html\n"
    assert "✓</span> healthy" in Path("health.html").read_text()


def test_json_alone_on_stdout(stage: Stage) -> None:
    outcome = invoke("health", "--initial-peers", stage.peer, "--level", "info", "--json")
    report = json.loads(outcome.out)
    assert (report["schema_version"], report["verdict"], outcome.code) == (1, "unknown", 3)


def test_degraded_ends_with_1_and_broken_with_3(stage: Stage) -> None:
    thin = invoke("health", "--initial-peers", stage.peer, "--min-replicas", "2")
    assert thin.code == 1 and "thin-blocks  blocks 0:5 have fewer than 2 servers" in thin.out
    more = invoke("health", "--initial-peers", stage.peer, "--dht-prefix", "stories260K-hf", "--num-blocks", "6")
    assert more.code == 3 and "no usable server holds blocks 5:6" in more.out
    nobody = invoke("health", "--initial-peers", stage.peer, "--dht-prefix", "nobody")
    assert nobody.code == 3 and "nobody announces 'nobody'" in nobody.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected exactly one swarm"),
        (["--public-swarm", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/Qm"], "expected exactly one swarm"),
        (["--initial-peers", "nowhere"], "expected a multiaddress"),
        (["--initial-peers", "PEER", "--level", "deep"], "expected one of record, info, forward, route"),
        (["--initial-peers", "PEER", "--concurrency", "0"], "concurrency"),
        (["--initial-peers", "PEER", "--serve", "9090"], "expected [HOST]:PORT"),
        (["--initial-peers", "PEER", "--serve", ":1", "--json"], "leave --watch, --json, --html out"),
        (["--initial-peers", "PEER", "--history", "h"], "--history is kept by --serve"),
        (["--initial-peers", "PEER", "--watch", "--every", "0"], "--every"),
        (["--initial-peers", "PEER", "--html", "nowhere/health.html"], "--html: expected a file in a folder"),
        (["--initial-peers", "PEER", "--is-reachable"], "--is-reachable is answered by --serve"),
        (["--initial-peers", "PEER", "--serve", ":1", "--dial-networks", "10.0.0.0/8"], "is for --is-reachable"),
        (["--initial-peers", "PEER", "--serve", ":1", "--is-reachable", "--dial-networks", "x"], "10.1.0.0/16"),
        (["--initial-peers", "PEER", "--verify-local", "0:3"], "expected both --model and --verify-local"),
        (["--initial-peers", "PEER", "--model", "m", "--verify-local", "0:3"], "name it with --dht-prefix"),
        (["--initial-peers", "PEER", "--model", "m", "--verify-local", "3"], "expected blocks FIRST:LAST"),
    ],
)
def test_mistakes_end_with_2_before_anybody_is_asked(arguments: list[str], words: str, stage: Stage) -> None:
    outcome = invoke("health", *(stage.peer if each == "PEER" else each for each in arguments))
    assert outcome.code == 2 and words in outcome.error


def test_servers_are_held_against_blocks_at_home(stage: Stage, tmp_path) -> None:
    """Its only server computes what these weights do, and not what those of another model of these sizes do."""
    command = ["health", "--initial-peers", stage.peer, "--dht-prefix", "stories260K-hf", "--verify-local", "1:4"]
    right = invoke(*command, "--model", stage.model)
    assert right.code == 0, right.out
    other = tmp_path / "other"
    shutil.copytree(stage.model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -one for name, one in weights.items()}, other / "model.safetensors", {"format": "pt"})
    wrong = invoke(*command, "--model", other)
    assert wrong.code == 3 and "disagrees-with-home" in wrong.out
    missing = invoke(*command, "--model", tmp_path / "nothing")
    assert missing.code == 2 and "nothing" in missing.error
    beyond = invoke(*command[:-1], "3:9", "--model", stage.model)
    assert beyond.code == 2 and "expected a span within 0:5" in beyond.error


def test_an_unreachable_swarm_ends_with_3() -> None:
    peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui"
    outcome = invoke("health", "--initial-peers", peer)
    assert outcome.code == 3 and "no initial peer answered" in outcome.err


def test_watch_shows_the_first_look_and_then_what_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("petals_eval.cli.health.time.sleep", sleep)
    outcome = invoke("health", "--initial-peers", stage.peer, "--watch", "--every", "5")
    assert outcome.code == 0 and outcome.out.count("asked up to level route") == 1
    assert "healthy, nothing changed" in outcome.out


def test_serve_answers_and_ends_with_ctrl_c(stage: Stage) -> None:
    """Its own look over a real swarm; the Ctrl-C comes once it has been asked."""
    from petals_eval.health.serving import serve_health

    said: list[str] = []
    pages: list[str] = []
    bootstrap = stage.peer.rpartition("/")[2]

    def say(line: str) -> None:
        said.append(line)
        if "healthy" in line:  # the first look is over
            url = said[0].split()[1]
            for path in ("", "metrics", "healthz", "api/v1/state", f"api/v1/is_reachable/{bootstrap}"):
                with urllib.request.urlopen(url + path, timeout=10) as answer:
                    pages.append(answer.read().decode())
            raise KeyboardInterrupt

    settings = HealthSettings(initial_peers=(stage.peer,))
    networks = [ip_network("127.0.0.0/8")]
    assert serve_health(settings, ":0", 60.0, Path("health.sqlite"), say, dial_networks=networks) == 0
    assert "stories260K-hf" in pages[0] and 'petals_model_blocks_covered{model="stories260K-hf"} 5.0' in pages[1]
    assert pages[2] == "ok\n" and json.loads(pages[3])["verdict"] == "healthy"
    assert json.loads(pages[4])["success"] is True
    assert said[0].startswith("serving http://127.0.0.1:") and said[-1] == "stopping"
    assert Path("health.sqlite").exists()
    assert not any(thread.name == "health page" for thread in _after(2.0))


def _after(seconds: float) -> list[threading.Thread]:
    """The threads, once the page's has ended or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(thread.name == "health page" for thread in threading.enumerate()):
        time.sleep(0.01)
    return threading.enumerate()


def test_a_run_says_first_whether_the_swarm_can_do_it(stage: Stage) -> None:
    outcome = invoke(*stage.run("--limit", "20"))
    assert outcome.code == 0
    line = next(line for line in outcome.err.splitlines() if line.startswith("swarm: "))
    assert re.search(
        r"3 servers hold all 5 blocks \(fewest: block 0, 1 server\); at the [\d,]{4,} tok/s they claim", line
    )
