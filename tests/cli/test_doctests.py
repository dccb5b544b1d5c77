"""The examples in the docstrings of the command line are true."""

import doctest

import petals_eval.cli.command
import petals_eval.cli.dry_run


def test_the_examples_hold() -> None:
    for module in (petals_eval.cli.command, petals_eval.cli.dry_run):
        outcome = doctest.testmod(module)
        assert outcome.attempted
        assert not outcome.failed
