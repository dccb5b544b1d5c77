"""The examples in the docstrings of the metrics are run."""

import doctest
import importlib
import pkgutil

import pytest

import petals_eval.metrics

MODULES = sorted(module.name for module in pkgutil.iter_modules(petals_eval.metrics.__path__))
WITHOUT_EXAMPLES = {"answers"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"petals_eval.metrics.{name}"))
    assert result.failed == 0
    assert (result.attempted > 0) == (name not in WITHOUT_EXAMPLES)
