"""What commands say while they work: at once, and again while a step takes long."""

import subprocess
import sys
import time

import pytest

from petals_eval.cli import steps
from petals_eval.demo import demo_paths
from tests.cli.invoking import invoke
from tests.cli.test_run import NOBODY

AT_ONCE = {
    "run": ["--model", "./m", "--task", "sst2", "--initial-peers", NOBODY],
    "demo": ["--servers", "3"],
    "swarm": [str(demo_paths().model)],
    "bootstrap": [],
    "merge": ["a", "b", "--out", "c"],
    "show": ["a"],
    "health": ["--initial-peers", NOBODY],
    "bench forward": ["--model", "./m", "--initial-peers", NOBODY],
}

SCRIPT = """if True:
    import sys
    from petals_eval.cli import main

    class FirstLine(Exception):
        pass

    class Screen:
        encoding = "utf-8"
        def isatty(self):
            return False
        def write(self, text):
            if not text.strip():
                return
            heavy = ("torch", "hivemind", "transformers", "numpy", "datasets", "yaml")
            sys.__stdout__.write(repr([name for name in heavy if name in sys.modules]) + text)
            sys.__stdout__.flush()
            import os
            os._exit(0)
        def flush(self):
            pass

    sys.stderr = Screen()
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", AT_ONCE)
def test_the_first_line_waits_for_no_library(command: str) -> None:
    """What takes seconds to import is imported when a person has been told what happens."""
    words = [sys.executable, "-c", SCRIPT, *command.split(), *AT_ONCE[command]]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.startswith("[]") and len(ended.stdout) > 5


def test_a_step_that_takes_long_is_told_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(steps, "REMINDER_SECONDS", 0.05)
    with steps.step("starting 3 servers", lambda: "1 of 3 serve"):
        time.sleep(0.5)
    time.sleep(0.2)
    first, again, *_ = lines = capsys.readouterr().err.splitlines()
    assert (first, again) == ("starting 3 servers", "  still starting 3 servers (0 s, 1 of 3 serve)")
    assert 2 < len(lines) < 12


def test_a_swarm_with_a_hole_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from petals_eval.local_swarm import LocalSwarm

    def ended(swarm: LocalSwarm) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSwarm, "wait", ended)
    outcome = invoke("swarm", demo_paths().model, "--span", "0:2", "--span", "0:2", "--span", "3:6")
    assert outcome.code == 0
    assert "serving 5 of 6 blocks (none of these servers holds 2:3) as model:" in outcome.out
