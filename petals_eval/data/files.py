"""Local files into memory-mapped tables."""

import codecs
import csv
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from petals_eval.data.arrow_files import ArrowTable, load_arrow, load_parquet
from petals_eval.data.first_bytes import ARROW, PARQUET, DamagedError, open_unpacked, what_it_is
from petals_eval.data.json_text import read_objects
from petals_eval.data.scratch import mapped, scratch_parent
from petals_eval.data.source import DataSource, FileFormat, format_of
from petals_eval.data.tables import LINE, JsonTable, Readable, TextTable, numbers_array, texts_array
from petals_eval.environment import local_path
from petals_eval.errors import DataError, MachineError
from petals_eval.text import plural
from petals_eval.validation import closest_beside, shorten

if TYPE_CHECKING:
    from pyarrow import RecordBatch

__all__ = ["file_fingerprint", "load_file", "load_json"]

_BATCH_ROWS = 2000
_BATCH_CHARACTERS = 1 << 23  # a batch of long texts is written before it has that many rows
_MAX_FIELD = 1 << 27
"""Characters of a csv field. The csv module's own limit is 131,072; without any, one quotation mark too many would
bring a whole file into memory."""
_TYPED: dict[FileFormat, tuple[tuple[bytes, ...], Callable[[Path], ArrowTable]]] = {
    "parquet": (PARQUET, load_parquet),
    "arrow": (ARROW, load_arrow),
}
_TYPED_BYTES = max(len(each) for beginnings, _ in _TYPED.values() for each in beginnings)


def load_file(source: DataSource) -> Readable:
    """Return the rows of a local file. Memory is bounded by a batch of rows, not by the file.

    csv, tsv and lines give text columns exactly as written, so that no row and no "NA" or "null" is lost to a guess of
    types; so does JSON, which says itself what is a text and what is none (see `Row`). Parquet and Arrow bring types of
    their own. Text and JSON may be compressed with gzip, bzip2 or xz.

    Blank lines, of blanks and tabs alone, are no rows, as in pandas; a row of delimiters alone is one. Lines end with
    "\\n" or "\\r\\n", or with "\\r" where there is no "\\n" at all, as pandas has it.

    Raises DataError for a file that is missing, empty or cannot be read as its format, naming the line, and
    MachineError when this machine refuses to read it or has no room for the table.
    """
    path = local_path(source.path)
    _check_file(source, path)
    try:
        kind = _kind(source, path)
        expected, load = _TYPED.get(kind, ((), None))
        with open_unpacked(path) if load is None else path.open("rb") as file:
            meaning = what_it_is(file, *expected)
        if meaning is not None:
            raise DataError(f"{path.name} cannot be read as {kind}: it is {meaning}.")
        if load is not None:
            return load(path)
        if kind == "jsonl":
            return load_json([path], source.encoding)
        return _load_text(source, path, kind)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not {source.encoding}: {error.reason} at byte {error.object[error.start : error.end]!r}. "
            "Say how it is written, such as encoding: latin-1."
        ) from None
    except UnicodeError as error:  # of the rarer encodings, such as punycode
        raise DataError(f"{path.name} is not {source.encoding}: {str(error)[:120]}. Say how it is written.") from None
    except DamagedError as error:
        raise DataError(f"{path.name} cannot be unpacked: {str(error)[:200]}. Is it complete?") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's word for a damaged file
            raise DataError(
                f"{path.name} cannot be read as {kind}: {str(error).strip()[:200]} Is it complete?"
            ) from error
        raise MachineError(f"cannot read {source.path} into a table in {scratch_parent()}: {error}.") from error


def _kind(source: DataSource, path: Path) -> FileFormat:
    """Return how to read the file: as the source says, or what it shows itself to be, or else by its suffix.

    pandas' own example writes parquet under the suffix .parquet.gzip.
    """
    if source.format is not None:
        return source.format
    with path.open("rb") as file:
        first = file.read(_TYPED_BYTES)
    shown: Iterator[FileFormat] = (kind for kind, (beginnings, _) in _TYPED.items() if first.startswith(beginnings))
    return next(shown, format_of(source.path))


def file_fingerprint(source: DataSource) -> str:
    """Return a SHA-256 over the file's bytes, unpacked, and the settings that decide which rows they become; not over
    its name."""
    path = local_path(source.path)
    digest = hashlib.sha256()
    settings = {
        "format": _kind(source, path),
        "column_names": source.column_names,
        "delimiter": source.delimiter,
        "quoting": source.quoting,
        "pattern": source.pattern,
        "encoding": source.encoding,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    with open_unpacked(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _check_file(source: DataSource, path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"there is no file {source.path} (looked for {path.absolute()}).{closest_beside(path)} "
            "Give the path of a file, or the name of a data set on the hub, which looks like owner/name."
        )
    given = [name for name in ("subset", "split", "revision") if getattr(source, name) is not None]
    if given:
        raise DataError(f"{source.path} is a file, and a file has no {' and no '.join(given)}: leave it out.")
    if not path.is_file():
        raise DataError(
            f"{source.path} is a pipe or a device, and the rows are read more than once: save them in a file."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source.path} is empty: expected at least one row.")


def load_json(paths: Sequence[Path], encoding: str = "utf-8") -> JsonTable:
    """Return the objects of these files, one after the other.

    Rows of several files have no lines: one number is not enough.

    Raises DataError for what is no object, with its line (see `read_objects`), UnicodeError and OSError.
    """
    columns: dict[str, None] = {}

    def rows() -> Iterator[tuple[int | None, Sequence[str]]]:
        for path in paths:
            with _open_text(path, encoding) as file:
                for line, text, value in read_objects(file, path.name):
                    if not value.keys() <= columns.keys():
                        columns.update(dict.fromkeys(value))
                    yield line if len(paths) == 1 else None, (text,)

    batches = _stored(paths[0].name, 1, rows())  # all of it, before the columns are known
    return JsonTable(batches, tuple(columns))


def _load_text(source: DataSource, path: Path, kind: FileFormat) -> TextTable:
    # Python's own splitting would also break at a "\r" within a line, and str.splitlines at \x85, which is an ordinary
    # character of latin-1.
    with _open_text(path, source.encoding, _line_end(path, source.encoding)) as file:
        if kind == "lines":
            return _load_lines(source, path, file)
        with _long_fields():
            columns, rows = _table_rows(source, path, kind, file)
            return TextTable(_stored(path.name, len(columns), rows), columns)


def _load_lines(source: DataSource, path: Path, file: IO[str]) -> TextTable:
    lines = _Lines(file)
    if source.pattern is None:
        table = TextTable(_stored(path.name, 1, ((number, (line,)) for number, line in lines)), ("text",))
    else:
        pattern = re.compile(source.pattern)
        rows = _matches(pattern, path, lines)
        table = TextTable(_stored(path.name, len(pattern.groupindex), rows), tuple(pattern.groupindex))
    if lines.blank:
        table.notes = (f"{path.name}: {plural(lines.blank, 'blank line')} left out: a blank line is no row",)
    return table


@contextmanager
def _open_text(path: Path, encoding: str, newline: str = "\n") -> Iterator[IO[str]]:
    """Open a text, unpacked, whose lines end with `newline`; "" reads it as it is. Raises as `open_unpacked` does."""
    # For utf-8 a codec that takes a byte order mark, too.
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with open_unpacked(path) as file, io.TextIOWrapper(file, encoding=codec, newline=newline) as text:
        yield text


def _line_end(path: Path, encoding: str) -> str:
    """Return "\\n", or "\\r" for a text that has this alone, as old Macs wrote it and Excel for Mac still does."""
    with _open_text(path, encoding, newline="") as text:
        found = "\n"
        while part := text.read(1 << 20):
            if "\n" in part:
                return "\n"
            if "\r" in part:
                found = "\r"
        return found


_field_limit = threading.RLock()


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module take fields of up to `_MAX_FIELD` characters inside the block: its limit is the process's."""
    with _field_limit:
        before = csv.field_size_limit(_MAX_FIELD)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _stored(name: str, width: int, rows: Iterator[tuple[int | None, Sequence[str | None]]]) -> "list[RecordBatch]":
    """Return these rows, each a line number and `width` cells, memory-mapped. name: of the file, for messages."""
    import pyarrow as pa

    schema = pa.schema([(LINE, pa.int64()), *((str(number), pa.large_string()) for number in range(width))])

    def record_batch(batch: list[tuple[int | None, Sequence[str | None]]]) -> "RecordBatch":
        lines, cells = zip(*batch, strict=True)
        try:
            texts = [texts_array(values) for values in zip(*cells, strict=True)]
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}, lines {lines[0]} to {lines[-1]}: a text holds {error.object[error.start]!r}, "
                "half of a surrogate pair, which is no character. Correct the text or the encoding."
            ) from None
        return pa.record_batch([numbers_array(lines), *texts], schema=schema)

    return mapped(schema, map(record_batch, _batches(rows)))


def _batches(
    rows: Iterator[tuple[int | None, Sequence[str | None]]],
) -> Iterator[list[tuple[int | None, Sequence[str | None]]]]:
    batch: list[tuple[int | None, Sequence[str | None]]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(cell) for cell in row[1] if cell)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _table_rows(
    source: DataSource, path: Path, kind: FileFormat, file: IO[str]
) -> tuple[tuple[str, ...], Iterator[tuple[int, Sequence[str | None]]]]:
    """Return the names of the columns, and each row: the line where it begins, from 1, and its fields."""
    records = _records(source, path, kind, file)
    first = next(records, None)
    if first is None:
        raise DataError(f"{path.name} has no rows: it holds only blank lines.")
    names = source.column_names or tuple(first[1])
    if source.column_names is None and len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise DataError(
            f"{path.name}: its first line should name the columns, each once; found {shorten(twice)} twice. "
            "If it is a row already, give column_names."
        )
    if odd := next((name for name in names if "\0" in name), None):
        raise DataError(f"{path.name}: the name of a column holds a zero byte: {shorten(odd)}. Is it text?")
    return names, _fields(names, path, first, records)


class _Lines:
    """The lines of a file that are not blank: (line number from 1, line without its end).

    blank: how many there were of the others so far.
    """

    def __init__(self, file: IO[str], delimiter: str = ""):
        self._file = file
        self._delimiter = delimiter
        self.blank = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self._file, start=1):
            line = line.removesuffix("\n").removesuffix("\r")
            if _is_blank(line, self._delimiter):
                self.blank += 1
            else:
                yield number, line


def _is_blank(line: str, delimiter: str = "") -> bool:
    """Return whether pandas skips a line: blanks and tabs alone, unless these are delimiters between empty fields."""
    return not line.strip(" \t\r\n") and (not delimiter or delimiter not in line)


def _matches(pattern: re.Pattern[str], path: Path, lines: _Lines) -> Iterator[tuple[int, Sequence[str | None]]]:
    for row, (number, line) in enumerate(lines):
        match = pattern.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path.name}, row {row} (line {number}) does not match the pattern {pattern.pattern}: "
                f"{shorten(line)}. Correct the line, the pattern or the encoding."
            )
        yield number, tuple(match.group(name) for name in pattern.groupindex)


def _records(source: DataSource, path: Path, kind: FileFormat, file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of each line, or lines in quotation marks, that is not blank."""
    delimiter = source.delimiter or ("\t" if kind == "tsv" else ",")
    quoting = source.quoting if source.quoting is not None else kind == "csv"
    if not quoting:
        for number, line in _Lines(file, delimiter):
            yield number, line.split(delimiter)
        return
    lines = _Followed(file)
    # strict: a quotation mark that is never closed would otherwise swallow the rest of the file as one field.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 1
    try:
        for fields in reader:
            # A line of blanks in quotation marks is a row: only the line itself tells it from a blank one.
            if reader.line_num > number or not _is_blank(lines.last, delimiter):
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}, line {reader.line_num} is not well-formed {kind}: {_slip(error, number)}."
        ) from None


def _slip(error: csv.Error, begin: int) -> str:
    """Return what is wrong with a row that begins in this line, and what to do; by the csv module's words."""
    ordinary = "If quotation marks are ordinary characters there, set quoting: false"
    if "new-line character" in str(error):
        return (
            "a carriage return (\\r) stands outside of quotation marks. Put the field in quotation marks, or remove it"
        )
    if "unexpected end" in str(error):
        return f"the file ends within quotation marks, of the row that begins in line {begin}. {ordinary}"
    if "field limit" in str(error):
        return f"a field has more than {_MAX_FIELD:,} characters; the row begins in line {begin}. {ordinary}"
    return f"{error}. {ordinary}"


class _Followed:
    """The lines of a file, the last of which can be looked at."""

    def __init__(self, file: IO[str]):
        self._file = file
        self.last = ""

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.last = line
            yield line


def _fields(
    names: tuple[str, ...], path: Path, first: tuple[int, list[str]], records: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, Sequence[str]]]:
    row = 0
    if tuple(first[1]) != names:
        yield _checked(names, path, row, *first)
        row = 1
    for number, fields in records:
        yield _checked(names, path, row, number, fields)
        row += 1


def _checked(names: tuple[str, ...], path: Path, row: int, number: int, fields: list[str]) -> tuple[int, list[str]]:
    if len(fields) != len(names):
        raise DataError(
            f"{path.name}, row {row} (line {number}): expected {len(names)} columns ({', '.join(names):.80}), "
            f"found {len(fields)}, the last of which holds {shorten(fields[-1])}. Check the delimiter, quotation marks "
            "and the column names."
        )
    return number, fields
