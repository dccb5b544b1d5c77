"""A run that is ended from outside: its exit code, what it says, what it keeps, and that nothing is left running."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import Stage
from tests.cli.invoking import invoke

SECONDS = 90  # until a step of another process must be done; the machine may be busy

# As a shell starts a command in the foreground: Ctrl-C is not ignored, whatever the test runner's own parent did.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from petals_eval.cli import main; main(sys.argv[1:])"
)


def start(*arguments: object) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal gives it one."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What it says until it ends, which it must within a time; and that everything it started has ended, too."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    print(out, err, sep="\n--- stderr\n")
    assert "Traceback" not in out + err
    assert psutil.wait_procs(children, timeout=10)[1] == []
    return out, err


def scored(journal: Path) -> int:
    if not journal.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM scored").fetchone()[0]
    except sqlite3.OperationalError:  # its tables are being made
        return 0


def wait_for(condition, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_an_ended_run_keeps_what_is_scored_and_goes_on(
    stage: Stage, number: signal.Signals, code: int, words: str
) -> None:
    slow = ["--window", 1, "--tokens-per-micro-batch", 64]
    process = start(*stage.run("--out", "r", *slow))
    wait_for(lambda: scored(Path("r/journal.sqlite")) > 0, process)
    # To the whole group, as a terminal sends Ctrl-C: the libp2p daemon gets it, too.
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    out, err = finish(process)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert process.returncode == code
    assert out == ""
    kept = scored(Path("r/journal.sqlite"))
    assert 0 < kept < 500
    assert err.splitlines()[-2:] == [
        words,
        f"  {kept} of 500 examples are scored and kept in r. Run the same command again to go on.",
    ]

    outcome = invoke(*stage.run("--out", "r"))
    assert outcome.code == 0
    assert f"{500:,}/500" in outcome.err
    found = json.loads(Path("r/metrics.json").read_text())
    assert found["n_examples"] == 500
    assert found["metrics"]["accuracy"]["value"] == 0.7360
    # Not one example was computed twice.
    assert scored(Path("r/journal.sqlite")) == 500


def test_ctrl_c_before_anything_is_scored_leaves_nothing(stage: Stage) -> None:
    process = start(*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--local-swarm", 2, "--out", "r")
    wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert not Path("r").exists()


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start("tasks")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_swarm_in_the_foreground(stage: Stage) -> None:
    process = start("swarm", stage.model, "--span", "0:3", "--span", "2:5", "--dht-prefix", "mine")
    assert process.stdout is not None
    lines = []
    while "Ctrl-C ends it." not in lines:
        line = process.stdout.readline()
        assert line, process.communicate()
        lines.append(line.rstrip("\n"))
    assert lines[0] == "serving 5 blocks as mine:"
    assert [line.split()[:2] for line in lines[1:3]] == [["blocks", "0:3"], ["blocks", "2:5"]]
    assert lines[3] == "connect with:"
    printed = lines[4].split()
    assert printed[:2] == ["petals-eval", "run"]
    peer = printed[printed.index("--initial-peers") + 1]

    # What it printed can be typed, with a task and prompts.
    command = [*printed[1 : printed.index("--task")], "--task", "trec", "--adapter", stage.adapter()]
    assert peer in command
    outcome = invoke(*command, "--data", stage.trec, "--limit", 20)
    assert outcome.code == 0
    assert "20 examples · 0 failed" in outcome.out

    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process)
    assert process.returncode == 0
    assert out.split() == ["stopping"]
    assert err == ""
