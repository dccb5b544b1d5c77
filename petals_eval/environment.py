"""Environment variables for a while: libraries and programs we start are told through them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["unless_set"]


@contextmanager
def unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables meanwhile, where the user has set none of the name.

    The environment is as before afterwards: whoever calls us from Python may start other programs later.
    """
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
