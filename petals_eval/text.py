"""Text from strangers (peers, checkpoints, data sets), made safe to show."""

import sys
import unicodedata
from typing import IO

from rich.console import Console

__all__ = ["PLAIN_WIDTH", "console_for", "printable"]

PLAIN_WIDTH = 200  # where there is no terminal a line is not wrapped to a width nobody asked for


def printable(text: str, *, longest: int = 400, keep_lines: bool = False) -> str:
    """The text without what moves the cursor, recolours, hides or reorders: each such character becomes U+FFFD.

    longest: characters kept. keep_lines: newlines stay; otherwise they become spaces.

    >>> printable("fine")
    'fine'
    >>> printable("red: \\x1b[31m, \\u202eright to left")
    'red: \ufffd[31m, \ufffdright to left'
    >>> printable("a\\nb"), printable("a\\nb", keep_lines=True)
    ('a b', 'a\\nb')
    >>> printable("0123456789", longest=5)
    '0123…'
    """
    shown = "".join(_shown(character, keep_lines) for character in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _shown(character: str, keep_lines: bool) -> str:
    if character == "\n":
        return character if keep_lines else " "
    if character == "\t":
        return " "
    # C: control, format (bidirectional marks among them), surrogate, private, unassigned; Zl, Zp: line separators.
    category = unicodedata.category(character)
    return "\ufffd" if category[0] == "C" or category in ("Zl", "Zp") else character


def console_for(stream: IO[str] | None = None) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no guessed highlights.

    stream: stdout if None. Where it is no terminal there are no colours and lines are `PLAIN_WIDTH` wide.
    """
    file = stream or sys.stdout
    width = None if file.isatty() else PLAIN_WIDTH
    return Console(file=file, markup=False, emoji=False, highlight=False, width=width)
