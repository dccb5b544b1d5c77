"""JSON as it is written: objects out of a file one by one, and numbers that keep their spelling."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from petals_eval.errors import DataError
from petals_eval.validation import shorten

__all__ = ["WrittenFloat", "read_objects", "value_of"]

_CHARACTERS_AT_ONCE = 1 << 20
_MARK = re.compile(r"[^ \t\r\n]")  # what JSON does not take for blank
# What a message shows of a text that is not JSON: one value at most.
_TOKEN = re.compile(r'"[^"\n]*"?|[^,:{}\[\]"\n]+|.')
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class WrittenFloat(float):
    """A number of a JSON file, which `str` and `repr` show as it is written there: 4.50, 1e3, -0, NaN."""

    __slots__ = ("_written",)
    _written: str

    def __new__(cls, written: str) -> "WrittenFloat":
        number = super().__new__(cls, written)
        number._written = written
        return number

    def __repr__(self) -> str:
        return self._written

    __str__ = __repr__


def value_of(text: str) -> Any:
    """Return the value of a JSON text: a whole number as an int, every other number as a `WrittenFloat`."""
    # Only -0 needs a function for every whole number; a date looks like it and costs a little time.
    decoder = _decoder if "-0" in text else _quick_decoder
    return decoder.raw_decode(text)[0]


def read_objects(file: IO[str], name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield each object of a file: the line where it begins (from 1), its JSON text, and its value by `value_of`.

    The objects stand one a line, one after the other with or without blanks between them, or in one array; each may
    take several lines. Memory is bounded by the longest line and the largest object. `name` is the file's in messages.
    Raises DataError, which names the line, for what is not JSON or no object, for a key that an object has twice, and
    for half of a surrogate pair, which is no character.
    """
    reader = _Reader(file, name)
    if reader.next_mark() != "[":
        while reader.next_mark():
            yield reader.take_object()
        return
    reader.skip(1)
    mark = "," if reader.next_mark() != "]" else "]"
    while mark == ",":
        yield reader.take_object()
        mark = reader.next_mark()
        if mark not in (",", "]"):
            reader.fail("has neither a comma nor the end of the array behind an object")
        if mark == ",":
            reader.skip(1)
            reader.next_mark()
    reader.skip(1)
    if reader.next_mark():
        reader.fail("goes on behind the end of the array")


class _Reader:
    """A window on the file that ends where a line ends, so that no value but an object or an array is cut by it."""

    def __init__(self, file: IO[str], name: str):
        self._file = file
        self._name = name
        self._window = ""
        self._at = 0  # in the window
        self._line = 1  # of the file, there

    def next_mark(self) -> str:
        """Return the next character that is no blank, which is where the reader then is; an empty text at the end."""
        while True:
            found = _MARK.search(self._window, self._at)
            end = len(self._window) if found is None else found.start()
            if end > self._at:
                self.skip(end - self._at)
            if found is not None:
                return found.group()
            if not self._grow():
                return ""

    def skip(self, characters: int) -> None:
        self._line += self._window.count("\n", self._at, self._at + characters)
        self._at += characters

    def take_object(self) -> tuple[int, str, dict[str, Any]]:
        """Return the object that begins where the reader is; it is behind it afterwards."""
        value, end = self._decode()
        if not isinstance(value, dict):
            self.fail(f"should begin an object, found {_KINDS.get(type(value), 'a number')}")
        line, text = self._line, self._window[self._at : end]
        if "\\u" in text and _HALF_OF_A_PAIR.search(text):
            self._check_pairs(value)
        self.skip(end - self._at)
        return line, text, value

    def fail(self, problem: str) -> NoReturn:
        """Raises DataError: the line where the reader is, and what is wrong there."""
        raise DataError(
            f"{self._name} cannot be read: expected one JSON object a line, or an array of objects; "
            f"line {self._line} {problem}."
        )

    def _decode(self) -> tuple[Any, int]:
        while True:
            try:
                return _checking_decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                # Where JSON ends too early, the rest may stand in the next lines.
                behind = error.pos - self._at
                if error.pos < len(self._window.rstrip(" \t\r\n")) or not self._grow():
                    self._refuse(error.msg, behind)
            except _KeyGivenTwiceError as error:
                self.fail(f"gives the key {shorten(error.args[0])} twice in one object")
            except RecursionError:
                self.fail("holds values within values within values, too deep to be read")
            except ValueError:  # a whole number of thousands of digits
                self.fail("holds a number of more digits than Python reads")

    def _refuse(self, problem: str, behind: int) -> NoReturn:
        """Raises DataError for what is no JSON so many characters behind the reader."""
        before = self._window[self._at : self._at + behind]
        at_the_end = not self._window[self._at + behind :].strip()
        self.skip(len(before.rstrip()) if at_the_end else behind)  # the line where it ends, not the one after it
        token = _TOKEN.match(self._window, self._at)
        if at_the_end or token is None:
            self.fail(f"is not JSON ({problem}): it ends there")
        if behind == 0 and token.group() == ",":
            self.fail("has a comma between objects that stand one a line: leave it out")
        self.fail(f"is not JSON ({problem}): {shorten(token.group().rstrip())}")

    def _check_pairs(self, value: dict[str, Any]) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            self.fail("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: complete it")

    def _grow(self) -> bool:
        """Let go of what is behind and read on: as much as there is left, at least, so that large objects cost no more
        than small ones. Says whether there was anything.
        """
        left = self._window[self._at :]
        more = "".join(self._file.readlines(max(_CHARACTERS_AT_ONCE, len(left))))
        self._window, self._at = left + more, 0
        return bool(more)


class _KeyGivenTwiceError(ValueError):
    """An object has one key twice. Its argument is the key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _KeyGivenTwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return value


def _whole(written: str) -> int | float:
    """Return a whole number; of these, -0 alone has a second spelling in JSON."""
    return WrittenFloat(written) if written == "-0" else int(written)


_KINDS = {str: "a text", bool: "true or false", type(None): "null", list: "an array"}
_quick_decoder = json.JSONDecoder(parse_float=WrittenFloat, parse_constant=WrittenFloat)
_decoder = json.JSONDecoder(parse_int=_whole, parse_float=WrittenFloat, parse_constant=WrittenFloat)
_checking_decoder = json.JSONDecoder(
    parse_int=_whole, parse_float=WrittenFloat, parse_constant=WrittenFloat, object_pairs_hook=_object
)
