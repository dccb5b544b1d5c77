"""How a command ends: one place that turns what was raised into a message and an exit code."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from petals_eval.errors import InterruptedRunError, MachineError, PetalsEvalError

__all__ = ["run_command"]


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code. What goes wrong is said on stderr, without a traceback.

    Codes: 0 done, 1 below a bar that was set, 2 the caller's mistake, 3 the swarm cannot, 4 this machine cannot, 70 a
    bug of ours, 130 and 143 interrupted.
    """
    _quiet_libraries()
    try:
        with _termination_as_exception():
            return command()
    except PetalsEvalError as error:
        _say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; say nothing more, not even while the interpreter shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, PermissionError) as error:
        _say(f"error: {MachineError(f'this machine cannot: {type(error).__name__}: {error}')}")
        return MachineError.exit_code
    except Exception as error:  # noqa: BLE001  # the last resort: a bug of ours must not end as a traceback
        _say(f"error: a bug in petals-eval ({type(error).__name__}: {error})\n  traceback kept in {_keep_traceback()}")
        return PetalsEvalError.exit_code


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """SIGTERM, as batch schedulers send it, ends a run the way Ctrl-C does: everything scored is kept."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError("terminated; everything scored is kept", exit_code=128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201  # plain stderr: this must work when nothing else does


def _keep_traceback() -> Path:
    handle, name = tempfile.mkstemp(prefix="petals-eval-bug-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        file.write(traceback.format_exc())
    return Path(name)


def _quiet_libraries() -> None:
    """The libraries' own log lines are not for the user of a command; HIVEMIND_LOGLEVEL brings hivemind's back."""
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
