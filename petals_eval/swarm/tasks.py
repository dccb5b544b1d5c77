"""What hivemind's and our own background tasks have in common. No network."""

import asyncio
from typing import Any

__all__ = ["retrieve_exception"]


def retrieve_exception(task: "asyncio.Task[Any]") -> BaseException | None:
    """Return the exception that `task` ended with, or None; asyncio then does not log it as one that nobody retrieved.

    It fits `task.add_done_callback`.
    """
    return None if task.cancelled() else task.exception()
