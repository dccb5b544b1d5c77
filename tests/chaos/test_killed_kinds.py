"""The client is killed (SIGKILL) in runs of each kind of task, and resumed: every row exactly once, and its number."""

import json
import os
import subprocess
import sys
import time

import pytest

from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Slow
from tests.chaos.test_killed_client import SECONDS, kill, rows

COPA = "kind: choice\ntext: '{premise}'\nchoices: ['{choice1}', '{choice2}']\nlabel_column: label\nmetrics: [acc]\n"
KINDS = {
    "choice": COPA,
    "continuation": "kind: continuation\ntext: '{premise}'\ntarget: '{choice1}'\n",
    "perplexity": "kind: perplexity\ntext: '{premise} {choice1}'\nmetrics: [token_perplexity]\n",
}


@pytest.fixture(scope="module")
def swarm(realdata):
    """Its servers take their time, so that a run has a middle on any machine."""
    slow = Slow(delay=0.02)
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 3), (3, 5)], mode="process", faults=(slow,)) as running:
        yield running


def lines_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_numbers_of_a_quiet_one(kind, realdata, swarm, tmp_path):
    (tmp_path / "own.yaml").write_text(KINDS[kind])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out):
        return [
            *(sys.executable, "-c", "from petals_eval.cli import main; main()", "run", "--out", str(out)),
            *("--model", str(realdata / "stories260K-hf"), "--task", str(tmp_path / "own.yaml")),
            *("--data", str(realdata / "copa" / "test.jsonl"), "--tokens-per-micro-batch", "40", "--window", "2"),
            *("--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix),
        ]

    def run(out):
        return subprocess.run(command(out), capture_output=True, text=True, env=environment, timeout=SECONDS)

    quiet, out = tmp_path / "quiet", tmp_path / "run"
    assert run(quiet).returncode == 0
    every = {line["key"] for line in lines_of(quiet)}
    process = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        give_up = time.monotonic() + SECONDS
        while not rows(out / "journal.sqlite")[0]:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up, "nothing was scored in time"
            time.sleep(0.01)
        kill(process)
    finally:
        process.kill()
    kept, superseded = rows(out / "journal.sqlite")
    assert superseded == 0 and kept < every, "the run was over before it was killed"
    ended = run(out)
    assert ended.returncode == 0, ended.stderr
    assert f"{len(kept)} of {len(every)} examples are scored" in ended.stderr
    assert rows(out / "journal.sqlite") == (every, 0)
    for one, other in zip(lines_of(out), lines_of(quiet), strict=True):
        assert one == {key: near(value) for key, value in other.items()}


def near(value):
    """Numbers may differ as micro-batches of other rows round them."""
    numbers = value if isinstance(value, list) else [value]
    return pytest.approx(value, abs=1e-4) if all(isinstance(each, float) for each in numbers) else value
