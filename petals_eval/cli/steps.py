"""What a command is doing, told on stderr at once and while it takes long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import typer

__all__ = ["step"]

REMINDER_SECONDS = 10.0  # between two lines about one step


@contextlib.contextmanager
def step(what: str, how_far: Callable[[], str] | None = None) -> Iterator[None]:
    """Say what is done in the block: when it begins, and every `REMINDER_SECONDS` until it ends.

    what: such as "connecting to the swarm". how_far: returns what the reminder says besides, such as "1 of 3 serve"; it
    is called from another thread.
    """
    typer.echo(what, err=True)
    ended, began = threading.Event(), time.monotonic()

    def remind() -> None:
        while not ended.wait(REMINDER_SECONDS):
            details = [f"{time.monotonic() - began:.0f} s", *([] if how_far is None else [how_far()])]
            with contextlib.suppress(OSError, ValueError):  # a stream that was closed meanwhile takes no line
                typer.echo(f"  still {what} ({', '.join(details)})", err=True)

    reminder = threading.Thread(target=remind, name="reminder", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        ended.set()
        reminder.join()
