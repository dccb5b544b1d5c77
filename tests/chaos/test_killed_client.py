"""The client itself is killed (SIGKILL) at random moments of a run and resumed: every example exactly once, the same
metrics.

A few kills by default; `pytest tests/chaos/test_killed_client.py --client-kills 30 --client-seed 7` for more.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest

from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Slow

SECONDS = 90  # until a step of another process must be done; the machine may be busy
ROWS_A_KILL = 250  # so that the run is not over before the last kill


@pytest.fixture(scope="module")
def swarm(realdata):
    """Its servers take their time, so that a run has a middle on any machine."""
    unhurried = Slow(delay=0.04)
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 3), (3, 5)], mode="process", faults=(unhurried,)) as swarm:
        yield swarm


def command(realdata, swarm, limit, out):
    return [
        *(sys.executable, "-c", "from petals_eval.cli import main; main()", "run", "--out", str(out), "--task", "trec"),
        *("--model", str(realdata / "stories260K-hf"), "--data", str(realdata / "trec" / "TREC.train.all")),
        *("--adapter", str(realdata / "adapters" / "trec-deep_ptune"), "--limit", str(limit)),
        *("--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix),
    ]


SLOWLY = ("--window", "1", "--tokens-per-micro-batch", "100")


def rows(journal):
    """Keys of the valid rows, and how many are not."""
    if not journal.exists():
        return set(), 0
    connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    try:
        found = connection.execute("SELECT key, valid FROM scored").fetchall()
    except sqlite3.OperationalError:  # killed before the tables were made
        return set(), 0
    finally:
        connection.close()
    return {key for key, valid in found if valid}, sum(not valid for _, valid in found)


def kill_at_a_random_moment(process, journal, dice):
    """One in five while it starts, the others while it scores. Returns whether it was scoring."""
    starting = dice.random() < 0.2
    if starting:
        time.sleep(dice.uniform(0.0, 3.0))
    else:
        before = len(rows(journal)[0])
        give_up = time.monotonic() + SECONDS
        while len(rows(journal)[0]) <= before:
            assert process.poll() is None, f"it ended before it was killed: {process.communicate()}"
            assert time.monotonic() < give_up, "nothing was scored in time"
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 4.0))  # a slow disk is written to every few seconds
    kill(process)
    return not starting


def kill(process):
    """Kill a client; what it had started ends with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(children, timeout=10)[1] == [], "a killed client leaves nothing running"


def test_a_client_killed_at_random_moments_scores_every_example_exactly_once(realdata, swarm, tmp_path, request):
    kills = request.config.getoption("--client-kills")
    dice = random.Random(request.config.getoption("--client-seed"))
    limit = min(5452, ROWS_A_KILL * kills)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = command(realdata, swarm, limit, tmp_path / "run")
    journal = tmp_path / "run" / "journal.sqlite"
    kept: set[str] = set()
    in_flight = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [*run, *SLOWLY],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            in_flight += kill_at_a_random_moment(process, journal, dice)
        finally:
            process.kill()
        found, superseded = rows(journal)
        assert kept <= found, "what was committed is lost"
        assert superseded == 0, "an example was computed again"
        kept = found
    assert in_flight > 0, "no kill hit a run that was scoring"
    assert 0 < len(kept) < limit, "the run was over before the last kill"
    print(f"{kills} kills, {in_flight} of them while scoring; {len(kept)} of {limit} examples scored by then")

    ended = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert f"{len(kept):,} of {limit:,} examples are scored, {limit - len(kept):,} are left" in ended.stderr
    quiet = subprocess.run(
        command(realdata, swarm, limit, tmp_path / "quiet"),
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
    )
    assert quiet.returncode == 0, quiet.stderr

    found, superseded = rows(journal)
    assert (len(found), superseded) == (limit, 0)
    assert found == rows(tmp_path / "quiet" / "journal.sqlite")[0]
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "quiet"))
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "mcc"):
        assert one["metrics"].get(name) == other["metrics"].get(name), name
    assert one["confusion_matrix"] == other["confusion_matrix"]
    assert (one["n_scored"], one["n_failed"], one["n_tokens"]) == (limit, 0, other["n_tokens"])
    lines = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("run", "quiet")]
    assert [(each["key"], each["prediction"]) for each in map(json.loads, lines[0])] == [
        (each["key"], each["prediction"]) for each in map(json.loads, lines[1])
    ]
