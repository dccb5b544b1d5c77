"""Signals that end a command: the first one in order and within seconds, the second one at once. Both keep what is
scored."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from petals_eval.interrupts import deliver

__all__ = ["ending_signals", "how_it_ended", "interrupted_code"]

ORDERLY_SECONDS = 4.0  # to let go of the swarm, end servers and close files; then the process ends all the same


@contextlib.contextmanager
def ending_signals() -> Iterator[list[int]]:
    """Let SIGTERM, as batch schedulers send it, and SIGHUP, of a closed terminal, end a run the way Ctrl-C does.

    Yields the signals that came. KeyboardInterrupt, because libraries do not catch that on the way. A second signal,
    or a way out that takes too long, ends the process at once: the journals commit what waits, and what this process
    started (the libp2p daemon, servers of a local swarm) ends when its line to us breaks.
    """
    received: list[int] = []
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that a library forked, told to go by its pool
            os._exit(128 + number)
        received.append(number)
        if len(received) > 1:
            deliver(lambda: _end_at_once(received))
            return
        late = threading.Timer(ORDERLY_SECONDS, _end_at_once, [received])
        late.daemon = True
        late.start()
        timers.append(late)
        deliver(_interrupt)

    # A signal that is ignored stays so: that is how nohup lets a run outlive its terminal.
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in endings if signal.getsignal(number) != signal.SIG_IGN]
    timers: list[threading.Timer] = []
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


def how_it_ended(received: list[int]) -> str:
    return "interrupted" if received in ([], [signal.SIGINT]) else f"ended by {signal.Signals(received[0]).name}"


def interrupted_code(received: list[int]) -> int:
    return 128 + (received[0] if received else signal.SIGINT)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _end_at_once(received: list[int]) -> None:
    # Not imported for this: where it is not, nothing was scored.
    journal = sys.modules.get("petals_eval.runs.journal")
    try:
        if journal is not None:
            journal.commit_what_waits()
        with contextlib.suppress(OSError):
            os.write(2, f"{how_it_ended(received[:1])}, at once\n".encode())
    finally:
        os._exit(interrupted_code(received))
