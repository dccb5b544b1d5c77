"""A data loader that forks beside a connected client does no harm."""

import os
import signal
import time

import psutil
import pytest
from datasets import Dataset

import petals_eval
from tests.support.real_swarm import stories_swarm, trec_model


def test_datasets_map_with_processes_in_the_middle_of_a_run(realdata, tmp_path):
    """The workers copy a process with an event loop, a libp2p daemon and an open journal, and end by a signal."""
    mapped = []

    class Progress:
        def update(self, done, retries=0, servers=0, message=None):
            if done >= 100 and len(mapped) < 2:
                rows = Dataset.from_dict({"x": list(range(100))})
                found = rows.map(lambda row: {"y": row["x"] ** 2, "pid": os.getpid()}, num_proc=2)
                mapped.append(found["y"][:] == [x * x for x in range(100)])
                assert os.getpid() not in found["pid"][:], "it did not fork"

        def waiting(self, message):
            pass

    with (
        stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm,
        trec_model(realdata, swarm, window=2) as model,
    ):
        result = petals_eval.evaluate(
            model,
            task="trec",
            data=str(realdata / "trec" / "TREC.test.all"),
            out=tmp_path / "run",
            progress=Progress(),
            tokens_per_micro_batch=160,
        )
        assert mapped == [True, True]
        assert result.metrics["accuracy"].value == 0.7360
        assert result.retries == 0
        # The connection still answers, and a fork of the plain kind leaves it alone, too.
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        again = petals_eval.evaluate(model, task="trec", data=str(realdata / "trec" / "TREC.test.all"), limit=20)
        assert again.first.n_scored == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_forked_worker_is_not_one_to_the_command(number):
    from petals_eval.cli.signals import ending_signals

    with ending_signals() as received:
        is_there, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(there, b".")
            for _ in range(100):
                time.sleep(0.1)
            os._exit(99)
        os.read(is_there, 1)  # Python drops signals that come while it forks
        os.close(is_there)
        os.close(there)
        psutil.Process(pid).send_signal(number)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + number
        assert received == []
