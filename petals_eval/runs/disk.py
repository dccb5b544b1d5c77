"""Writing files so that a reader sees the old one or the new one, and naming the machine's faults."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from petals_eval.errors import MachineError

__all__ = ["TEMPORARY_SUFFIX", "advice", "blame_the_machine", "check_room", "write_atomically"]

TEMPORARY_SUFFIX = ".part"

_WHAT_TO_DO = {
    errno.ENOSPC: "The disk is full: free some space, then run the same command again; what was scored is kept.",
    errno.EDQUOT: "The disk quota is used up: free some space, then run the same command again.",
    errno.EFBIG: "The file may not grow (a size limit, see `ulimit -f`): raise it, then run the same command again.",
    errno.EROFS: "The file system is read-only: choose another folder with --out.",
    errno.EACCES: "No permission: choose another folder with --out.",
    errno.EPERM: "No permission: choose another folder with --out.",
    errno.EMFILE: "Too many open files (see `ulimit -n`): raise the limit, then run the same command again.",
}


def advice(number: int | None) -> str:
    """Return what to do about an error number of the operating system."""
    return _WHAT_TO_DO.get(number or 0, "Choose another folder with --out, or repair this one, and run again.")


@contextlib.contextmanager
def blame_the_machine(path: Path) -> Iterator[None]:
    """Turn an operating system's error about `path` into a MachineError that says what to do."""
    try:
        yield
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise MachineError(f"Expected to use {path}; found: {found}. {advice(error.errno)}") from error


def check_room(folder: Path, wanted: int = 0) -> None:
    """Raise MachineError where no folder could be written at `folder`, or less than `wanted` bytes are free there.

    It is tried, in the nearest folder that is there, and undone: permissions alone do not say it.
    """
    with blame_the_machine(folder):
        above = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        Path(tempfile.mkdtemp(prefix=".petals-eval-", suffix=TEMPORARY_SUFFIX, dir=above)).rmdir()
        free = shutil.disk_usage(above).free
    if free < wanted:
        raise MachineError(
            f"Expected {wanted / 1e6:.1f} MB of room for what is written at {folder}; found {free / 1e6:.1f} MB free. "
            "Free some space, or choose another folder with --out."
        )


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Write text to a file beside `path`, then rename it: a crash leaves the old file or the new one, whole.

    Raises MachineError.
    """
    with blame_the_machine(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 is too private for results that are shared
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
