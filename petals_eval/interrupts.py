"""Signal handlers that wait while something is written: what is half done is finished first, in milliseconds."""

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["deferred", "deliver"]


class _Pending:
    """What the main thread holds back; Python runs the handlers of signals there.

    depth: `deferred` blocks that it is in. action: of the last handler that came meanwhile.
    """

    depth = 0
    action: Callable[[], object] | None = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer what signal handlers `deliver` until the block ends. Outside of the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Pending.depth += 1
    try:
        yield
    finally:
        _Pending.depth -= 1
        if not _Pending.depth and _Pending.action is not None:
            action, _Pending.action = _Pending.action, None
            action()


def deliver(action: Callable[[], object]) -> None:
    """Call `action` at once or, while the main thread is `deferred`, at its end; of several the last one counts.

    It is for handlers of signals.
    """
    if _Pending.depth:
        _Pending.action = action
    else:
        action()
