"""The examples in the docstrings are run."""

import doctest

import petals_eval.runs.privacy


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(petals_eval.runs.privacy)
    assert result.attempted >= 2
    assert result.failed == 0
