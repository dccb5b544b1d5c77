"""The examples in the docstrings are true."""

import doctest
from types import ModuleType

import pytest

import petals_eval.runs.privacy
import petals_eval.runs.shard
import petals_eval.runs.thresholds


@pytest.mark.parametrize("module", [petals_eval.runs.thresholds, petals_eval.runs.privacy, petals_eval.runs.shard])
def test_examples_in_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
