"""The code that gives answers, as a hash: between two releases a version number says too little."""

import hashlib
import inspect
from pathlib import Path

__all__ = ["answering_code", "task_code"]

# From rows to answers. Neither metrics nor reports: these are made anew from the journal. What a generated text is
# worth is reckoned when it is there, for the journal does not hold it.
_ANSWERING = (
    *("data", "tasks", "model", "swarm", "generation", "remote_model.py", "live_model.py", "evaluation/scoring.py"),
    *("metrics/texts.py", "metrics/text_libraries.py"),
)


def answering_code(*more: str) -> str:
    """Return a SHA-256 over the sources of this package that an answer comes out of, the same on every machine.

    more: files or folders of the package that it comes out of where no run asks.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for name in (*_ANSWERING, *more):
        place = root / name
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        for file in files:
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def task_code(task: object) -> str | None:
    """Return a SHA-256 over the source of a task's class; None where it is of this package, or has no source."""
    kind = type(task)
    if kind.__module__.partition(".")[0] == "petals_eval":
        return None
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        return None
