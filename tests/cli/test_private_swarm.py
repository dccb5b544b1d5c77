"""`petals-eval bootstrap`, and `petals-eval swarm` joining it: one private swarm out of several commands."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from tests.cli.conftest import Stage
from tests.cli.invoking import invoke
from tests.cli.test_signals import finish, start

SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until_written(path: Path, process: Popen) -> str:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


@contextmanager
def running(*arguments: object, peers_file: Path) -> Iterator[str]:
    """The command while it runs, as the text of its peers file; then the SIGTERM of a container's end."""
    process = start(*arguments, "--peers-file", peers_file)
    try:
        yield until_written(peers_file, process)
        process.send_signal(signal.SIGTERM)
        out, err = finish(process)
        assert process.returncode == 0
        assert re.fullmatch(r"starting .*\n( *still starting .*\n)*", err)
        assert out.endswith("stopping\n")
        assert not peers_file.exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            finish(process)


def test_a_swarm_of_several_commands_at_addresses_that_stay(stage: Stage) -> None:
    port, other = free_port(), free_port()
    here = [f"--listen=/ip4/127.0.0.1/tcp/{port}", "--identity=bootstrap.key"]
    with running("bootstrap", *here, peers_file=Path("peers")) as first:
        assert first.startswith(f"/ip4/127.0.0.1/tcp/{port}/p2p/")
        assert Path("bootstrap.key").stat().st_mode & 0o077 == 0
    announced = f"--announce=/dns4/localhost/tcp/{port}"
    with running("bootstrap", *here, announced, peers_file=Path("peers")) as peer:
        # The same identity after a restart, under the name that it was told to announce.
        assert peer.splitlines() == [f"/dns4/localhost/tcp/{port}/p2p/{first.split('/')[-1].strip()}"]
        whole = ["swarm", stage.model, "--span", "0:5", "--dht-prefix", "mine", "--initial-peers", peer.strip()]
        there = [f"--listen=/ip4/127.0.0.1/tcp/{other}", "--identity=server.key"]
        with running(*whole, *there, peers_file=Path("ready")) as joined:
            assert joined == peer
            command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--dht-prefix", "mine"]
            outcome = invoke(*command, "--limit", 20, "--initial-peers", peer.strip())
            assert outcome.code == 0
            assert "20 examples · 0 failed" in outcome.out
        assert Path("server.key").exists()


def test_what_cannot_be_an_address_is_refused(stage: Stage) -> None:
    for command, expected in (
        (
            ["bootstrap", "--listen", "0.0.0.0:31330"],
            "--listen: expected a multiaddress such as /ip4/0.0.0.0/tcp/31330",
        ),
        (["bootstrap", "--announce", "/ip4/10.0.0.1"], "--announce: expected a multiaddress such as"),
        (["bootstrap", "--identity", "no/key"], "--identity: expected a file in a folder that is there, found no/key"),
        (["bootstrap", "--initial-peers", "nonsense"], "initial_peers.0: expected a multiaddress"),
        (["swarm", stage.model, "--initial-peers", ""], "initial_peers"),
        (["swarm", stage.model, "--identity", "key"], "are one server's, found 3 servers: give one --span"),
    ):
        outcome = invoke(*command)
        assert outcome.code == 2
        assert expected in outcome.error


def test_a_swarm_to_join_that_is_not_there(stage: Stage) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
    for command in (["bootstrap"], ["swarm", stage.model, "--span", "0:5"]):
        outcome = invoke(*command, "--initial-peers", nobody)
        assert outcome.code == 3
        assert f"no initial peer answered: {nobody} Check the addresses" in outcome.error


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = f"/ip4/127.0.0.1/tcp/{port}"
        outcome = invoke("bootstrap", "--listen", where)
    assert outcome.code == 4
    assert f"the port {port} of 127.0.0.1 is taken" in outcome.error
