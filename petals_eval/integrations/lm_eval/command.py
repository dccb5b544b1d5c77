"""The harness's own command, with this backend for its model where it is told of no other."""

import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from petals_eval.errors import ConfigError

__all__ = ["BACKEND", "run_harness"]

BACKEND = "petals-eval"
_COMMANDS = ("run", "ls", "validate", "-h", "--help")
_MISTAKES = (ValueError, TypeError, LookupError, OSError, AssertionError, NotImplementedError)
"""What the harness raises where its user is mistaken: a task that is not there, a flag that needs another one, ..."""


def run_harness(arguments: Sequence[str]) -> int:
    """Run `lm-eval` with these arguments in this process, and return its exit code.

    With `--output_path` the manifest is written there, too. Raises ConfigError where the harness itself refuses what it
    was told, and what this backend raises.
    """
    with _typed(_completed(arguments)):
        try:
            cli_evaluate()
        except SystemExit as end:  # of argparse, which has said why
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except _MISTAKES as error:
            if any(_is_ours(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[1:]):
                raise
            raise ConfigError(f"lm-evaluation-harness: {type(error).__name__}: {error}") from error
    return 0


def _completed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with this backend as the model and a file for its manifest, where they name neither."""
    command, *rest = arguments if arguments and arguments[0] in _COMMANDS else ("run", *arguments)
    if command != "run" or not rest:
        return list(arguments)
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--config", "-C")
    parser.add_argument("--output_path", "-o")
    parser.add_argument("--model_args", "-a", nargs="+", action="extend")
    told, _ = parser.parse_known_args(rest)
    if told.model is None and told.config is None:
        rest += ["--model", BACKEND]
    # Arguments of the model that stand in a file would be replaced, not completed.
    if told.output_path and told.model_args and told.model in (None, BACKEND):
        rest += ["--model_args", f"manifest={_manifest_beside(Path(told.output_path))!r}"]
    return [command, *rest]


def _manifest_beside(output: Path) -> str:
    """Return the file for a manifest in the harness's folder of results, or beside its file of them."""
    name = f"petals-eval-manifest_{datetime.now().isoformat(timespec='seconds').replace(':', '-')}.json"
    return str(output.with_name(f"{output.stem}_{name}") if output.suffix == ".json" else output / name)


def _is_ours(file: str) -> bool:
    return Path(__file__).parents[2] in Path(file).parents


@contextmanager
def _typed(arguments: Sequence[str]) -> Iterator[None]:
    """Let the process's arguments be these for the body: the harness's parser looks at no others."""
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before
