"""What the environment says: where the home folder is, and variables by which libraries are told something."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["environment_defaults", "local_path"]


def local_path(path: str | Path) -> Path:
    """Return where a path is on this machine: `~` is the home folder, `~nobody` without such a user just a name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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
