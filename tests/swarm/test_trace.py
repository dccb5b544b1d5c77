"""The path of one micro-batch in steady state: the files it passes are those that swarm/README.md lists, and few."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import petals_eval.swarm
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm import RemoteSequential, Work
from tests.support.real_swarm import STORIES, connect
from tests.support.tensors import hidden_states

PACKAGE = Path(petals_eval.swarm.__file__).parent
MAX_FILES, MAX_LINES = 16, 2600
SPANS = [(0, 3), (3, 5)]
WARM_UP = 6  # micro-batches
TRACED = 3


class Tracer:
    """The files of the package in which any function runs, in all threads that are started while it is entered."""

    def __init__(self) -> None:
        self._files: set[str] | None = None

    def __enter__(self) -> "Tracer":
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if self._files is not None and event == "call":
            self._files.add(frame.f_code.co_filename)

    def start(self) -> None:
        self._files = set()

    def stop(self) -> set[str]:
        files, self._files = self._files or set(), None
        return {str(Path(file).relative_to(PACKAGE)) for file in files if Path(file).is_relative_to(PACKAGE)}


def trace_micro_batch(blocks: RemoteSequential, tracer: Tracer) -> set[str]:
    """Return the files that the last micro-batch of a stream passed, from when it was made to when it was back."""
    answered = sum(peer.calls for peer in blocks.peers.values())

    def work() -> Iterator[Work[int]]:
        for number in range(WARM_UP + 1):
            if number == WARM_UP:  # by itself: those before it are back
                while sum(peer.calls for peer in blocks.peers.values()) < answered + WARM_UP * len(SPANS):
                    time.sleep(0.01)
                time.sleep(0.2)
                tracer.start()
            yield Work(number, hidden_states(2, 16, 64, seed=number), None)

    (files,) = (tracer.stop() for computed in blocks.stream(work()) if computed.tag == WARM_UP)
    return files


def listed_files() -> list[str]:
    """Return the files of the path in swarm/README.md, in order."""
    section = (PACKAGE / "README.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert section.startswith("The path of one micro-batch\n")
    return re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE)


def test_a_micro_batch_in_steady_state_passes_the_files_of_the_readme_and_no_others(realdata):
    """Nothing is audited or pushed, the directory is fresh, and no server is due to be probed again."""
    quiet = {"verify": 0, "push": "never", "recheck_share": 0, "update_period": 3600, "request_timeout": 60}
    servers = LocalSwarm(realdata / STORIES, spans=SPANS, mode="process")
    with servers as swarm, Tracer() as tracer, connect(swarm, **quiet) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, 5)
        # Where the machine stands still for a second a replica is looked for: one of them was spared that.
        passed = min((trace_micro_batch(blocks, tracer) for _ in range(TRACED)), key=len)
    assert sorted(passed) == sorted(listed_files())


def test_the_path_of_a_micro_batch_is_short():
    files = listed_files()
    assert len(files) == len(set(files)) <= MAX_FILES
    assert sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in files) <= MAX_LINES
