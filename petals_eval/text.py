"""Text for people: words of strangers (peers, checkpoints, data sets) made safe to show, counts and lists."""

import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PLAIN_WIDTH", "console_for", "listed", "plural", "printable"]

PLAIN_WIDTH = 200  # columns; where there is no terminal a line is not wrapped to a width nobody asked for


def printable(text: str, *, longest: int | None = 400, keep_lines: bool = False) -> str:
    """Return the text without control characters, cut to `longest` characters (None: all of it).

    What moves the cursor, recolours, hides or reorders becomes U+FFFD, and every blank a space. keep_lines: newlines
    stay newlines.

    >>> printable("fine")
    'fine'
    >>> printable("red: \\x1b[31m, \\u202eright to left")
    'red: \ufffd[31m, \ufffdright to left'
    >>> printable("a\\nb"), printable("a\\nb", keep_lines=True)
    ('a b', 'a\\nb')
    >>> printable("0123456789", longest=5)
    '0123…'
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(
        character
        if character.isprintable() or (keep_lines and character == "\n")
        else " "
        if character.isspace()
        else "\ufffd"
        for character in text
    )


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return the count with its noun: `one` where it is 1, otherwise `many`, or `one` with an s.

    >>> plural(1, "server"), plural(2, "server"), plural(0, "retry", "retries")
    ('1 server', '2 servers', '0 retries')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(words: Iterable[str], *, most: int = 6) -> str:
    """Return the first `most` words with commas between them, and how many more there are.

    >>> listed("abc"), listed("abcde", most=2)
    ('a, b, c', 'a, b and 3 more')
    """
    every = list(words)
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {more} more" if more > 0 else "")


def console_for(stream: IO[str] | None = None) -> "Console":
    """Return a console that prints text as it is: no markup, no emoji codes, no guessed highlights.

    stream: stdout if None. Where it is no terminal there are no colours and lines are `PLAIN_WIDTH` wide.
    """
    from rich.console import Console  # not above: it draws a random number, and a training loop may have seeded them

    file = stream or sys.stdout
    width = None if file.isatty() else PLAIN_WIDTH
    return Console(file=file, markup=False, emoji=False, highlight=False, width=width)
