"""Environment variables that are set for a while: libraries and programs that we start are told through them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["environment_defaults"]


@contextmanager
def environment_defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these variables in the block where the user has not.

    The environment is as before afterwards: whoever calls us from Python may start other programs later.
    """
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
