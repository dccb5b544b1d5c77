"""The only server of some blocks is gone for a while and comes back: the run waits, says why, and finishes.

Ten seconds by default; `pytest tests/chaos/test_returning_server.py --server-absence 60` for longer.
"""

import os
import re
import signal
import threading
import time

import pytest

from tests.chaos.test_killed_servers import (
    ACCURACY,
    EXAMPLES,
    Watcher,
    computed_by,
    files,
    freeze,
    predictions,
    quiet,
    remote,
    run,
    same,
    swarm_of,
)

__all__ = ["files", "quiet", "swarm_of"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("leaving", ["stopped", "killed"])
def test_a_run_waits_for_the_only_server_of_a_block_and_finishes(leaving, files, swarm_of, quiet, tmp_path, request):
    """stopped: it hangs, with its connections open. killed: it starts anew under its old identity."""
    absence = request.config.getoption("--server-absence")
    swarm = swarm_of([(0, 2)], update_period=4.0)
    identity = {"identity_path": str(tmp_path / "identity")}
    server = swarm.add_server((2, 5), **identity)
    went, returned, comers = [], [], []

    def come_back():
        time.sleep(absence)
        if leaving == "stopped":
            os.killpg(server.pid, signal.SIGCONT)
            comers.append(server)
        else:
            comers.append(swarm.add_server((2, 5), **identity))
        returned.append(time.monotonic())

    returning = threading.Thread(target=come_back)

    def leave():
        went.append(time.monotonic())
        freeze(server) if leaving == "stopped" else server.kill()
        returning.start()

    with remote(
        files, swarm, request_timeout=1.5, connect_timeout=1.5, max_backoff=2.0, deadline=absence + 50
    ) as model:
        watcher = Watcher(lambda done: done >= 100, leave)
        result = run(files, model, tmp_path / "run", watcher)
        finished = time.monotonic()
    returning.join(30)
    assert watcher.done_then is not None and watcher.done_then < EXAMPLES / 2, "not the middle of the run"
    assert finished > returned[0] > went[0] + absence, "it did not wait"
    waiting = [line for line in watcher.messages if "blocks 2:5" in line]
    assert len(waiting) > absence / 5, "said while waiting"
    gone = r"(does not answer|cannot be reached)"
    why = rf"every server of blocks 2:5 fails \(since \d\d:\d\d\): \.\.\.{server.peer_id[-6:]}: {gone}"
    assert all(re.search(rf"{why}|no server holds blocks 2:5 \(since", line) for line in waiting[3:]), waiting[-1]
    assert all("deadline in 0" in line for line in waiting)
    assert comers[0].peer_id == server.peer_id
    assert computed_by(tmp_path / "run")[server.peer_id] == EXAMPLES
    same(predictions(tmp_path / "run"), quiet)
    assert (result.metrics["accuracy"].value, result.first.n_failed) == (ACCURACY, 0)
