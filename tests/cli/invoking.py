"""Run the command inside this process, and see what a user would see."""

import contextlib
import io
import re
from dataclasses import dataclass

from petals_eval.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What is said on stderr, its blanks and line ends as single blanks."""
        return re.sub(r"\s+", " ", self.err)


def invoke(*arguments: object) -> Outcome:
    """`petals-eval` with these arguments. No command may show a traceback, whatever its exit code."""
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    outcome = Outcome(code, out.getvalue(), err.getvalue())
    # Shown by pytest when the test fails.
    print(outcome.out, outcome.err, sep="\n--- stderr\n")
    assert "Traceback" not in outcome.out + outcome.err
    return outcome
