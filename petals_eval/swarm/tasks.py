"""Tasks of the event loop: several together, questions that are asked once, errors that somebody else has told."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

__all__ = ["Once", "retrieve_exception", "together"]

T = TypeVar("T")


def retrieve_exception(task: "asyncio.Task[Any]") -> BaseException | None:
    """Return the exception that `task` ended with, or None; asyncio then does not log it as one that nobody retrieved.

    It fits `task.add_done_callback`, for tasks whose error somebody is told in another way.
    """
    return None if task.cancelled() else task.exception()


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run the calls side by side; return all results, or raise the first error with the rest cancelled.

    asyncio.gather would let the rest run on. asyncio.TaskGroup cancels its own task to say that one has failed, and up
    to Python 3.12 that stays counted: a timeout around it then raises CancelledError in the place of TimeoutError.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done:
                task.result()  # raises the error, if it is this one that failed
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.add_done_callback(retrieve_exception)
            task.cancel()
        await asyncio.wait(tasks)


class Once(Generic[T]):
    """A question that is asked once and whose answer is kept. A question that failed is asked again.

    Callers that come while it is under way share it, and one of them that is cancelled does not cancel it.
    answer: the answer, once `is_answered`.
    """

    __slots__ = ("_task", "answer", "is_answered")

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None
        self.answer: T | None = None
        self.is_answered = False

    @property
    def is_open(self) -> bool:
        """Whether nobody has asked, or the question failed."""
        task = self._task
        return task is None or (task.done() and not self.is_answered)

    async def get(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the answer, asking first where nobody has. Raises what `ask` raises."""
        if self._task is None or self.is_open:
            self._task = asyncio.create_task(self._ask(ask))
            self._task.add_done_callback(retrieve_exception)
        return await asyncio.shield(self._task)

    async def _ask(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        answer = await ask()
        self.answer, self.is_answered = answer, True
        return answer

    def ask_anew(self) -> None:
        """Forget an answer. A question under way stays: its answer will be new."""
        if self._task is not None and self._task.done():
            self._task, self.answer, self.is_answered = None, None, False
