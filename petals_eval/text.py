"""Text for people: words of strangers (peers, checkpoints, data sets) made safe to show, numbers, counts and lists."""

import math
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PLAIN_WIDTH", "console_for", "listed", "number_text", "p_value_text", "plural", "printable"]

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


def number_text(value: float, decimals: int = 4, *, beside: float | None = None) -> str:
    """Return a number with so many decimals; from 100 on with fewer, so that the digits stay as many; and a small one
    with its own digits, so that it is not 0.

    beside: the number that it is an interval's bound of, whose size says how many decimals there are.

    >>> [number_text(value) for value in (0.736, -0.25, 0.0, 12.34567, 123.4567, 12345.6789, 1234567.8, 12345678.9)]
    ['0.7360', '-0.2500', '0.0000', '12.3457', '123.457', '12,345.7', '1,234,568', '1.23457e+07']
    >>> number_text(0.00012345), number_text(0.0000123, 3, beside=0.25), number_text(98.7, 3, beside=1234.5)
    ('0.000123', '0.000', '98.7')
    >>> number_text(41984.2, 0), number_text(1.7e308, 0), number_text(5e-324, 0)
    ('41,984', '1.7e+308', '5e-324')
    """
    size = abs(value if beside is None else beside)
    if not size < 1e7:
        return f"{value:.{decimals + 2}g}"
    if 0 < size < 0.001:
        return f"{value:.{max(1, decimals - 1)}g}"
    beyond = max(0, math.floor(math.log10(size)) - 1) if size else 0
    return f"{value:,.{max(0, decimals - beyond)}f}"


def p_value_text(p_value: float | None) -> str:
    """Return a p-value with three decimals; "-" where there is none.

    >>> [p_value_text(p) for p in (0.39119, 0.0412, 1.0, 0.00002, None)]
    ['0.391', '0.041', '1.000', '<0.001', '-']
    """
    if p_value is None:
        return "-"
    return "<0.001" if p_value < 0.0005 else f"{p_value:.3f}"


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
