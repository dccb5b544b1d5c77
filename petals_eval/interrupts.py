"""Signals wait while something is written: what is half done is finished first, which takes milliseconds."""

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["now_or_soon", "undisturbed"]


class _Held:
    """Of the main thread: Python runs the handlers of signals there."""

    depth = 0
    waiting: Callable[[], object] | None = None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What `now_or_soon` is given meanwhile happens at the end of this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth and _Held.waiting is not None:
            action, _Held.waiting = _Held.waiting, None
            action()


def now_or_soon(action: Callable[[], object]) -> None:
    """For a signal's handler: act at once or, while the main thread is `undisturbed`, right after. Of several the last
    one counts."""
    if _Held.depth:
        _Held.waiting = action
    else:
        action()
