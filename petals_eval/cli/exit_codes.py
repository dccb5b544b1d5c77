"""How a command ends: one place that turns what was raised into a message and an exit code."""

import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from petals_eval.cli.signals import ending_signals, how_it_ended, interrupted_code
from petals_eval.environment import environment_defaults
from petals_eval.errors import CallerError, InterruptedRunError, MachineError, PetalsEvalError
from petals_eval.text import printable

__all__ = ["run_command"]

# Errors of the operating system that are this machine's and not ours.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.EIO}

# What is wrong with a path that somebody gave: wherever a file is looked for, the name may be too long to look.
_PATHS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code. What goes wrong is said on stderr, without a traceback.

    Codes: 0 done, 1 below a bar that was set, 2 the caller's mistake, 3 the swarm cannot, 4 this machine cannot, 70 a
    bug of ours, 130 interrupted (Ctrl-C), 143 terminated, 129 the terminal was closed, 141 nobody reads our output.
    """
    with _quiet_libraries(), ending_signals() as received:
        try:
            code = command()
            sys.stdout.flush()
            return code
        except InterruptedRunError as error:
            _say("\n".join([how_it_ended(received), *getattr(error, "__notes__", ())]))
            return interrupted_code(received)
        except KeyboardInterrupt:
            _say(how_it_ended(received))
            return interrupted_code(received)
        except PetalsEvalError as error:
            _say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
            return error.exit_code
        except BrokenPipeError:
            # Whoever read our output has left; say nothing more, not even while the interpreter shuts down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        except Exception as error:  # noqa: BLE001  # the last resort: a bug of ours must not end as a traceback
            if received:  # some libraries make errors of their own of an interrupt
                _say(how_it_ended(received))
                return interrupted_code(received)
            if isinstance(error, OSError) and error.errno in _PATHS and isinstance(error.filename, str):
                path = printable(error.filename, longest=80)
                _say(f"error: the path {path!r} cannot be used: {error.strerror}. Check it.")
                return CallerError.exit_code
            if _is_the_machines(error):
                _say(f"error: this machine cannot: {type(error).__name__}: {error}")
                return MachineError.exit_code
            _say(
                f"error: a bug in petals-eval ({type(error).__name__}: {error})\n"
                f"  traceback kept in {_keep_traceback()}: please report it"
            )
            return PetalsEvalError.exit_code


def _is_the_machines(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _MACHINE
    # torch.OutOfMemoryError by its name: this must not import torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _say(message: str) -> None:
    """Print to stderr, and that alone: words of peers and of files are in the message."""
    text = printable(message, longest=None, keep_lines=True)
    with contextlib.suppress(OSError):  # a closed terminal takes no message
        print(text, file=sys.stderr, flush=True)  # noqa: T201  # plain: this must work when nothing else does


def _keep_traceback() -> Path:
    handle, name = tempfile.mkstemp(prefix="petals-eval-bug-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return Path(name)


_QUIET = {
    "HIVEMIND_LOGLEVEL": "CRITICAL",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """The libraries' own log lines are not for the user of a command; HIVEMIND_LOGLEVEL brings hivemind's back.

    Nor are their warnings: whoever asks Python to show them, or to make errors of them, means a program of their own.
    """
    for name in ("transformers", "huggingface_hub", "matplotlib"):  # where they are imported already
        logging.getLogger(name).setLevel(logging.ERROR)
    with environment_defaults(_QUIET), warnings.catch_warnings():
        if sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
