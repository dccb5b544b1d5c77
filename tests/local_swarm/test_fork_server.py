"""Server processes end with their launcher, however that one ends."""

import signal
import subprocess
import sys

import psutil
import pytest

from tests.support.tiny_models import make_tiny

BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("bloom", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


def gone(processes, seconds):
    """Whether all `processes` end within `seconds`."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mode", "number"), [("process", signal.SIGKILL), ("process", signal.SIGINT), ("thread", signal.SIGKILL)]
)
def test_nothing_outlives_the_launcher(folder, mode, number):
    program = (
        "import signal, sys\n"
        "from petals_eval.local_swarm import LocalSwarm\n"
        # A shell without a terminal starts its background jobs with SIGINT ignored, and this would inherit it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with LocalSwarm(sys.argv[1], servers=2, mode=sys.argv[2]) as swarm:\n"
        "    print('up', flush=True)\n"
        "    swarm.wait()\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert launcher.stdout.readline() == "up\n"
        below = psutil.Process(launcher.pid).children(recursive=True)
        assert sum(process.name() == "p2pd" for process in below) == 3
        launcher.send_signal(number)
        assert gone(below, 20)
        _, errors = launcher.communicate(timeout=20)
    finally:
        launcher.kill()
        launcher.wait()
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt"), "one traceback, the launcher's own"
        assert errors.count("Traceback") == 1
