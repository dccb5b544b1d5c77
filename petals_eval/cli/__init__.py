"""The command `petals-eval`."""

import sys
from collections.abc import Sequence

from petals_eval.cli.exit_codes import run_command
from petals_eval.cli.streams import ready_streams

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `petals-eval` with `arguments` (None: those of the process) and exit.

    Exit codes: see petals_eval.cli.exit_codes.run_command.
    """

    def command() -> int:
        from petals_eval.cli.app import run_app  # here: Ctrl-C is ours from now on, also while this is imported

        return run_app(arguments)

    ready_streams()
    sys.exit(run_command(command))
