"""A run that is ended from outside: its exit code, what it says, what it keeps, and that nothing is left running."""

import json
import os
import resource
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
from tests.cli.test_run import NOBODY

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


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_an_ended_run_keeps_what_is_scored_and_goes_on(
    unhurried: Stage, number: signal.Signals, code: int, words: str
) -> None:
    stage = unhurried
    process = start(*stage.run("--out", "r", "--window", 8, "--tokens-per-micro-batch", 64))
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


def journal_of(process: subprocess.Popen, path: Path, at_least: int) -> None:
    wait_for(lambda: scored(path) >= at_least, process)


def end(process: subprocess.Popen, *numbers: signal.Signals) -> float:
    """Send these to the command alone, as a batch scheduler does; returns the seconds until it has ended."""
    started = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    process.wait(SECONDS)
    return time.monotonic() - started


def test_sigterm_while_it_connects(stage: Stage) -> None:
    """To an address where nobody is: it would try for 30 seconds."""
    command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--dht-prefix", "x", "--out", "r"]
    process = start(*command, "--initial-peers", NOBODY)
    wait_for(lambda: psutil.Process(process.pid).children(), process)  # the libp2p daemon
    assert end(process, signal.SIGTERM) < 10
    _, err = finish(process)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("ended by SIGTERM")
    assert not Path("r").exists()


def test_sigterm_while_a_local_swarm_starts(stage: Stage) -> None:
    process = start(*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--local-swarm", 2, "--out", "r")
    wait_for(lambda: psutil.Process(process.pid).children(), process)  # the process that servers are forked from
    children = psutil.Process(process.pid).children(recursive=True)
    assert end(process, signal.SIGTERM) < 10
    _, err = finish(process)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("ended by SIGTERM")
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert not Path("r").exists()


def test_sigterm_while_metrics_are_computed(stage: Stage) -> None:
    """Everything is scored; the same command makes the report."""
    process = start(*stage.run("--out", "r", "--fail-under", "roc_auc=0", "f1_weighted=0", "precision[human]=0"))
    journal_of(process, Path("r/journal.sqlite"), 500)
    assert end(process, signal.SIGTERM) < 10
    _, err = finish(process)
    assert process.returncode == 143
    assert "500 of 500 examples are scored and kept in r. Run the same command again to go on." in err
    assert not Path("r/report.md").exists()
    assert invoke(*stage.run("--out", "r")).code == 0
    assert scored(Path("r/journal.sqlite")) == 500
    assert json.loads(Path("r/metrics.json").read_text())["metrics"]["accuracy"]["value"] == 0.7360


@pytest.mark.sample(1)
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGINT, signal.SIGTERM]], ids=["one", "two"])
def test_a_way_out_that_hangs_is_cut_short(unhurried: Stage, numbers: list[signal.Signals]) -> None:
    """The libp2p daemon is frozen, so letting go of the swarm takes its five seconds and more."""
    stage = unhurried
    process = start(*stage.run("--out", "r", "--window", 4, "--tokens-per-micro-batch", 64))
    journal_of(process, Path("r/journal.sqlite"), 1)
    [daemon] = psutil.Process(process.pid).children()
    daemon.suspend()
    try:
        took = end(process, *numbers)
    finally:
        daemon.resume()
    _, err = finish(process)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted, at once"
    assert took < (5 + 5 if len(numbers) == 1 else 4), "the second one ends it before the first one's patience is over"
    psutil.wait_procs([daemon], timeout=10)
    assert not daemon.is_running()
    kept = scored(Path("r/journal.sqlite"))
    assert kept >= 1
    assert invoke(*stage.run("--out", "r")).code == 0
    assert scored(Path("r/journal.sqlite")) == 500


def test_two_signals_at_once_keep_what_waits_to_be_committed(tmp_path: Path) -> None:
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from petals_eval.cli.signals import ending_signals
        from petals_eval.runs import Journal
        from petals_eval.tasks.requests import Prediction
        with ending_signals():
            journal = Journal(Path(sys.argv[1]), create=True)
            for key in range(100):
                journal.add("a", Prediction(str(key), 0, 1, ((0.1,), (0.2,)), 5))
            assert journal._pending, "nothing waits"
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
    """
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "j")], capture_output=True, timeout=SECONDS)
    assert (ended.returncode, ended.stderr) == (130, b"interrupted, at once\n")
    assert scored(tmp_path / "j") == 100


def test_a_disk_that_fills_in_mid_run_ends_it_with_4_and_loses_nothing(unhurried: Stage) -> None:
    """No file of the process may grow any more, as on a full disk."""
    stage = unhurried
    process = start(*stage.run("--out", "r", "--window", 4, "--tokens-per-micro-batch", 64))
    journal_of(process, Path("r/journal.sqlite"), 1)
    size = Path("r/journal.sqlite-wal").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    committed = scored(Path("r/journal.sqlite"))
    out, err = finish(process)
    assert process.returncode == 4
    assert out == ""
    assert "error: Expected to use the journal r/journal.sqlite; found: " in err
    assert "run the same command again" in err or "run the command again" in err
    kept = scored(Path("r/journal.sqlite"))
    assert committed <= kept < 500
    assert f"{kept} of 500 examples are scored and kept in r. Run the same command again to go on." in err
    assert invoke(*stage.run("--out", "r")).code == 0
    assert scored(Path("r/journal.sqlite")) == 500
    assert json.loads(Path("r/metrics.json").read_text())["metrics"]["accuracy"]["value"] == 0.7360


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
    assert all("starting 2 servers of " in line for line in err.splitlines())
