"""The command `petals-eval`."""

import atexit
import gc
import sys
from collections.abc import Sequence

from petals_eval.cli.exit_codes import run_command
from petals_eval.cli.streams import ready_streams

__all__ = ["main"]

# Objects made until garbage is looked for, and how often all of it is. With Python's own 700 and 10 a sixth of a small
# run goes into looking through torch's modules again and again while the next ones are imported.
_GARBAGE_AFTER = (50_000, 5, 5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `petals-eval` with `arguments` (None: those of the process) and exit.

    Exit codes: see petals_eval.cli.exit_codes.run_command.
    """

    def command() -> int:
        from petals_eval.cli.app import run_app  # here: Ctrl-C is ours from now on, also while this is imported

        return run_app(arguments)

    ready_streams()
    gc.set_threshold(*_GARBAGE_AFTER)
    atexit.register(gc.freeze)  # or the interpreter looks for garbage once more before it ends: half a second
    sys.exit(run_command(command))
