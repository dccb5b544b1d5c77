"""The examples in the docstrings are true."""

import doctest
from importlib import import_module

import pytest

NAMES = ("canary", "outlook", "serving", "terminal")


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    found = doctest.testmod(import_module(f"petals_eval.health.{name}"))
    assert found.failed == 0
    assert found.attempted > 0
