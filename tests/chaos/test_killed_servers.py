"""Servers that die, hang, vanish and come back while a run is under way: real processes, real signals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import petals_eval
from petals_eval.errors import DeadlineError, MissingBlocksError, RunFolderError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Slow
from petals_eval.runs import RunFolder

EXAMPLES = 500
ACCURACY = 0.7360
ADAPTER = "trec-deep_ptune"
# Small micro-batches, and servers that take their time: so that there is a middle of the run on any machine.
SMALL = {"tokens_per_micro_batch": 160}
UNHURRIED = Slow(delay=0.05)


class Watcher:
    """Progress that acts once, in the middle of a run: as soon as `when(done)`, `act()`."""

    def __init__(self, when, act):
        self.when, self.act = when, act
        self.done_then = None
        self.messages = []

    def update(self, done, retries=0, servers=0, message=None):
        if self.done_then is None and self.when(done):
            self.done_then = done
            self.act()

    def waiting(self, message):
        self.messages.append(message)


@pytest.fixture(scope="module")
def files(realdata, tmp_path_factory):
    shipped = (Path(petals_eval.__file__).parent / "tasks" / "builtin" / "trec.yaml").read_text()
    task = tmp_path_factory.mktemp("task") / "trec.yaml"
    task.write_text(re.sub(r"(?m)^metrics: .*", "metrics: [accuracy]", shipped))  # the others take seconds a run
    return {
        "task": str(task),
        "model": str(realdata / "stories260K-hf"),
        "adapter": str(realdata / "adapters" / ADAPTER),
        "data": str(realdata / "trec" / "TREC.test.all"),
    }


@pytest.fixture
def swarm_of(files):
    """Starts process swarms; ends them with the test."""
    running = []

    def start(spans, **options):
        swarm = LocalSwarm(files["model"], spans=spans, mode="process", faults=(UNHURRIED,), **options)
        running.append(swarm)
        return swarm.start()

    yield start
    for swarm in running:
        for server in swarm.servers:
            server.kill()  # some are stopped and would not hear a goodbye
        swarm.stop()


def remote(files, swarm, **settings):
    return petals_eval.RemoteModel.from_pretrained(
        files["model"],
        adapter=files["adapter"],
        initial_peers=swarm.initial_peers,
        dht_prefix=swarm.dht_prefix,
        **{"window": 6, "deadline": 60.0, **settings},
    )


def run(files, model, out, progress=None):
    return petals_eval.evaluate(model, task=files["task"], data=files["data"], out=out, progress=progress, **SMALL)


def predictions(folder):
    with RunFolder.open(folder) as opened:
        return {each.key: each for each in opened.journal.predictions(ADAPTER)}


def computed_by(folder):
    """Examples by the servers that computed a hop of them."""
    with RunFolder.open(folder) as opened:
        return {server.peer_id: count for server, count in opened.journal.servers()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, one in found.items():
        other = expected[key]
        assert (one.label, one.prediction) == (other.label, other.prediction), key
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5), key


@pytest.fixture(scope="module")
def quiet(files, tmp_path_factory):
    """The predictions of a run in which nothing happens."""
    out = tmp_path_factory.mktemp("runs") / "quiet"
    with LocalSwarm(files["model"], spans=[(0, 3), (3, 5)], mode="thread") as swarm, remote(files, swarm) as model:
        result = run(files, model, out)
    assert result.retries == 0
    assert result.metrics["accuracy"].value == ACCURACY
    return predictions(out)


def in_flight(model, server):
    """Tokens the server is working on for this client."""
    return model.blocks._pipeline.peers.of(server.peer_id).tokens_in_flight


def freeze(server):
    """Stop a server and its daemon in mid-sentence: connections stay open, nothing answers."""
    os.killpg(server._pid, signal.SIGSTOP)


@pytest.mark.sample(1)
@pytest.mark.parametrize("harm", [lambda server: server.kill(), freeze], ids=["killed", "stopped"])
def test_losing_one_of_two_replicas_in_mid_run_changes_no_prediction(harm, files, swarm_of, quiet, tmp_path):
    swarm = swarm_of([(0, 3), (0, 3), (3, 5)])
    victim, replica, _ = swarm.servers
    with remote(files, swarm, request_timeout=1.0, connect_timeout=1.0) as model:
        lost_tokens = []

        def act():
            lost_tokens.append(in_flight(model, victim))
            harm(victim)

        watcher = Watcher(lambda done: done >= 100 and in_flight(model, victim), act)
        started = time.monotonic()
        result = run(files, model, tmp_path / "run", watcher)
    assert watcher.done_then is not None and watcher.done_then < EXAMPLES / 2, "not the middle of the run"
    assert lost_tokens[0] > 0, "nothing was on its way to the server when it was lost"
    assert result.retries > 0
    assert time.monotonic() - started < 40
    counts = computed_by(tmp_path / "run")
    assert 0 < counts[victim.peer_id] <= watcher.done_then + 100
    assert counts[victim.peer_id] + counts[replica.peer_id] == EXAMPLES
    same(predictions(tmp_path / "run"), quiet)
    assert result.metrics["accuracy"].value == ACCURACY


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("update_period", "deadline", "error", "says"),
    [
        # Its record outlives it by minutes.
        (
            120.0,
            5.0,
            DeadlineError,
            r"every server of blocks 2:5 fails \(since \d\d:\d\d\): \.\.\.(?P<peer>\w+): cannot be reached \(all d",
        ),
        # Its record has expired when the deadline passes.
        (1.0, 6.0, MissingBlocksError, r"no server holds blocks 2:5 \(since \d\d:\d\d, 1 server holds the rest\)"),
    ],
    ids=["record lives on", "record expires"],
)
def test_without_the_only_server_of_a_block_the_run_ends_in_time_and_keeps_what_it_has(
    update_period, deadline, error, says, files, swarm_of, quiet, tmp_path
):
    swarm = swarm_of([(0, 2), (2, 5)], update_period=update_period)
    victim = swarm.servers[1]
    with remote(files, swarm, deadline=deadline, request_timeout=2.0, max_backoff=1.0) as model:
        killed = []
        watcher = Watcher(lambda done: done >= 100, lambda: (victim.kill(), killed.append(time.monotonic())))
        with pytest.raises(error) as caught:
            run(files, model, tmp_path / "run", watcher)
        assert time.monotonic() - killed[0] < deadline + 5
    assert watcher.done_then is not None
    message = str(caught.value)
    assert re.match(rf"stopped at the deadline \({deadline:g} s\): {says}", message), message
    assert "\n" not in message and len(message) < 600
    if error is MissingBlocksError:
        assert caught.value.missing == ((2, 5),)
    else:
        assert victim.peer_id.endswith(re.search(says, message)["peer"])
    assert any("blocks 2:5" in line and "deadline in 00:0" in line for line in watcher.messages), "said while waiting"

    kept = predictions(tmp_path / "run")
    assert watcher.done_then <= len(kept) < EXAMPLES
    same(kept, {key: quiet[key] for key in kept})
    assert any(
        f"{len(kept)} of {EXAMPLES} examples are scored and kept in {tmp_path / 'run'}" in note
        for note in caught.value.__notes__
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("leaving", ["killed", "in order"])
def test_a_run_goes_on_when_another_server_takes_over_the_blocks(leaving, files, swarm_of, quiet, tmp_path):
    swarm = swarm_of([(0, 2), (2, 5)])
    victim = swarm.servers[1]
    comers = []

    def replace():
        time.sleep(1.5)  # for a while nobody holds the blocks
        comers.append(swarm.add_server((2, 5)))

    replacing = threading.Thread(target=replace)

    def act():
        victim.kill() if leaving == "killed" else victim.stop()
        replacing.start()

    with remote(files, swarm, request_timeout=3.0) as model:
        watcher = Watcher(lambda done: done >= 100, act)
        result = run(files, model, tmp_path / "run", watcher)
    replacing.join(30)
    assert result.retries > 0
    assert any("blocks 2:5" in message for message in watcher.messages)
    counts = computed_by(tmp_path / "run")
    assert counts[victim.peer_id] > 0 and counts[comers[0].peer_id] > 0
    assert counts[victim.peer_id] + counts[comers[0].peer_id] == EXAMPLES
    same(predictions(tmp_path / "run"), quiet)
    assert result.metrics["accuracy"].value == ACCURACY


def test_the_command_ends_with_3_says_what_is_missing_and_goes_on_when_run_again(files, swarm_of, quiet, tmp_path):
    swarm = swarm_of([(0, 2), (2, 5)])
    out = tmp_path / "run"
    command = [
        *(
            sys.executable,
            "-c",
            "from petals_eval.cli import main; main()",
            "run",
            "--task",
            files["task"],
            "--out",
            str(out),
        ),
        *("--model", files["model"], "--adapter", files["adapter"], "--data", files["data"]),
        *("--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix),
        *("--deadline", "5", "--request-timeout", "2", "--tokens-per-micro-batch", "160", "--window", "2"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        scored = wait_for_rows(out, process)
        swarm.servers[1].kill()
        killed = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 3, stderr
    assert time.monotonic() - killed < 5 + 20
    assert stdout == ""
    assert "Traceback" not in stderr
    error = stderr[stderr.index("error: ") :]
    assert re.match(
        r"error: stopped at the deadline \(5 s\): every server of blocks 2:5 fails \(since .....\): \.\.\.\w+: cannot",
        error,
    ), stderr
    kept = predictions(out)
    assert scored <= len(kept) < EXAMPLES
    assert f"\n  {len(kept)} of {EXAMPLES} examples are scored and kept in {out}. Run the same command again" in error
    assert not (out / "metrics.json").exists()

    swarm.add_server((2, 5))
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    metrics = json.loads(again.stdout)
    assert f'"value": {ACCURACY}' in json.dumps(metrics)
    same(predictions(out), quiet)


def wait_for_rows(folder, process):
    """Wait until the run's journal holds a row; returns how many."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(RunFolderError):  # not there yet, or being made
            scored = len(predictions(folder))
            if scored:
                return scored
        time.sleep(0.05)
    raise AssertionError(f"no rows in time; exit code {process.poll()}: {process.communicate(timeout=5)[1]}")
