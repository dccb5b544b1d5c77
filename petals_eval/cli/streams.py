"""The standard streams as a command needs them, whatever it was started with; and JSON that any of them can hold."""

import codecs
import io
import json
import os
import sys

__all__ = ["json_text", "ready_streams"]

_REFUSING = ("strict", "surrogateescape")  # how a stream takes what it cannot hold: the second is that of locale C


def ready_streams() -> None:
    """Open those of the standard streams that are closed, on nothing, and let the others take any text.

    A closed one would be given to the next file that is opened, and what is printed would go there; libuv, which runs
    the connection, ends the process when that happens. A character that a stream's encoding lacks becomes `?`: a run
    does not fail for the dot in its result.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper) and stream.errors in _REFUSING:
            stream.reconfigure(errors="replace")


def json_text(value: object, indent: int | None = None) -> str:
    r"""Return strict JSON for stdout, with `\u` escapes where its encoding does not hold every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_unicode = codecs.lookup(encoding).name.startswith("utf")
    return json.dumps(value, indent=indent, ensure_ascii=not is_unicode, allow_nan=False)
