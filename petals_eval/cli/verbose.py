"""`--verbose`, which every command has: the debug events of our loggers on stderr, with the time."""

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from petals_eval.errors import MachineError
from petals_eval.text import printable

__all__ = ["with_verbose"]

VARIABLE = "PETALS_EVAL_LOG"
_FLAG = typer.Option("--verbose", help=f"Tell on stderr why the client does what it does (or set {VARIABLE}=1).")


def with_verbose(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the flag `--verbose`; the variable does for it, too, unless it is empty or 0."""

    def told(verbose: bool = False, **values: Any) -> int:
        _check_working_folder()
        if not verbose and os.environ.get(VARIABLE, "") in ("", "0"):
            return command(**values)
        with _events_on_stderr():
            return command(**values)

    signature = inspect.signature(command, eval_str=True)
    flag = inspect.Parameter(
        "verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _FLAG]
    )
    told.__signature__ = signature.replace(parameters=[*signature.parameters.values(), flag])  # type: ignore[attr-defined]
    return told


def _check_working_folder() -> None:
    """Raise MachineError where the folder that the command was started in is gone: libraries find worse words."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        raise MachineError("the folder that this was started in was deleted: change to one that is there.") from None


@contextlib.contextmanager
def _events_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("petals_eval"), _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at that moment: a progress bar puts itself in between. Peers' words are made safe."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed terminal takes no line
            sys.stderr.write(printable(self.format(record), longest=None, keep_lines=True) + "\n")
