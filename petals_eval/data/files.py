"""Local files into memory-mapped tables. Nothing stays on the disk: the table's file is unlinked once it is mapped."""

import codecs
import csv
import errno
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from petals_eval.data.first_bytes import what_it_is
from petals_eval.data.json_text import read_objects
from petals_eval.data.source import DataSource, FileFormat, format_of, local_path
from petals_eval.data.tables import LINE, JsonTable, Readable, Table, TextTable, numbers_array, texts_array
from petals_eval.errors import DataError, MachineError
from petals_eval.validation import shorten

if TYPE_CHECKING:
    from pyarrow import RecordBatch

__all__ = ["file_fingerprint", "load_file", "load_json", "scratch_folder", "without_progress_bars"]

_BATCH_ROWS = 2000
_BATCH_CHARACTERS = 1 << 23  # a batch of long texts is written before it has that many rows
# What pyarrow raises for a damaged file is an OSError too, but without one of these numbers.
_MACHINE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)


def load_file(source: DataSource) -> Readable:
    """Return the rows of a local file. Memory is bounded by a batch of rows, not by the file.

    csv, tsv and lines give text columns exactly as written, so that no row and no "NA" or "null" is lost to a guess of
    types; so does JSON, which says itself what is a text and what is none (see `Row`). Parquet brings types of its own.

    Blank lines, of blanks and tabs alone, are no rows, as in pandas; a row of delimiters alone is one.

    Raises DataError for a file that is missing, empty or cannot be read as its format, naming the line, and
    MachineError when this machine refuses to read it or has no room for the table.
    """
    path = local_path(source.path)
    _check_file(source, path)
    kind = source.format or format_of(source.path)
    try:
        if meaning := what_it_is(path, *((b"PAR1",) if kind == "parquet" else ())):
            raise DataError(f"{path.name} cannot be read as {kind}: it is {meaning}.")
        if kind == "parquet":
            return _load_parquet(path)
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
    except OSError as error:
        if error.errno is None:  # pyarrow's word for a damaged file
            raise DataError(
                f"{path.name} cannot be read as {kind}: {str(error).strip()[:200]} Is it complete?"
            ) from error
        raise MachineError(f"cannot read {source.path} into a table in {_scratch_parent()}: {error}.") from error


def file_fingerprint(source: DataSource) -> str:
    """Return a SHA-256 over the file's bytes and the settings that decide which rows they become; not over its name."""
    digest = hashlib.sha256()
    settings = {
        "format": source.format or format_of(source.path),
        "column_names": source.column_names,
        "delimiter": source.delimiter,
        "quoting": source.quoting,
        "pattern": source.pattern,
        "encoding": source.encoding,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    with local_path(source.path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for tables while they are being written: under HF_DATASETS_CACHE if set, else where temporary files go.

    It is removed at the end of the block. On Linux and macOS a mapped file lives on, without a name, until it is
    unmapped.
    """
    parent = os.environ.get("HF_DATASETS_CACHE")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="petals-eval-rows-", dir=parent) as folder:
        yield folder


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the screen inside the block; afterwards they are as they were."""
    from datasets.utils import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@contextmanager
def without_log_lines() -> Iterator[None]:
    """Keep the log of `datasets` off stderr inside the block: it has each error that it raises, with the whole path."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _scratch_parent() -> str:
    return os.environ.get("HF_DATASETS_CACHE") or tempfile.gettempdir()


def _check_file(source: DataSource, path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"there is no file {source.path} (looked for {path.absolute()}). "
            "Give the path of a file, or the name of a data set on the hub, which looks like owner/name."
        )
    given = [name for name in ("subset", "split", "revision") if getattr(source, name) is not None]
    if given:
        raise DataError(f"{source.path} is a file, and a file has no {' and no '.join(given)}: leave it out.")
    if path.stat().st_size == 0:
        raise DataError(f"{source.path} is empty: expected at least one row.")


def _load_parquet(path: Path) -> Table:
    import datasets
    from pyarrow import parquet

    with scratch_folder() as folder, without_progress_bars(), without_log_lines():
        try:
            if parquet.read_metadata(path).num_rows == 0:
                raise DataError(f"{path.name} is empty: expected at least one row.")
            files = glob.escape(str(path.absolute()))
            return Table(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=folder))
        # datasets 5 lets a bare StopIteration out where a file has no row.
        except (datasets.builder.DatasetGenerationError, ValueError, TypeError, StopIteration) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno in _MACHINE:
                raise cause from None
            reason = f"{type(cause).__name__}: {cause}"
            raise DataError(f"{path.name} cannot be read: expected a parquet file; {reason}") from error


def load_json(paths: Sequence[Path], encoding: str = "utf-8") -> JsonTable:
    """Return the objects of these files, one after the other.

    Rows of several files have no lines: one number is not enough.

    Raises DataError for what is no object, with its line (see `read_objects`), UnicodeError and OSError.
    """
    columns: dict[str, None] = {}

    def rows() -> Iterator[tuple[int | None, Sequence[str]]]:
        for path in paths:
            with path.open(encoding=_read_encoding(encoding), newline="\n") as file:
                for line, text, value in read_objects(file, path.name):
                    if not value.keys() <= columns.keys():
                        columns.update(dict.fromkeys(value))
                    yield line if len(paths) == 1 else None, (text,)

    batches = _stored(paths[0].name, 1, rows())  # all of it, before the columns are known
    return JsonTable(batches, tuple(columns))


def _load_text(source: DataSource, path: Path, kind: FileFormat) -> TextTable:
    # newline="\n": only "\n" ends a line. Python's own splitting would also break at \r, and str.splitlines at \x85,
    # which is an ordinary character of latin-1.
    with path.open(encoding=_read_encoding(source.encoding), newline="\n") as file:
        columns, rows = _text_rows(source, path, kind, file)
        return TextTable(_stored(path.name, len(columns), rows), columns)


def _stored(name: str, width: int, rows: Iterator[tuple[int | None, Sequence[str | None]]]) -> "list[RecordBatch]":
    """Return these rows, each a line number and `width` cells, memory-mapped. name: of the file, for messages.

    By pyarrow alone: `datasets`, and pandas with it, would take a second to import.
    """
    import pyarrow as pa

    schema = pa.schema([(LINE, pa.int64()), *((str(number), pa.large_string()) for number in range(width))])
    with scratch_folder() as folder:
        table = str(Path(folder) / "rows.arrow")
        with pa.OSFile(table, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(rows):
                lines, cells = zip(*batch, strict=True)
                try:
                    texts = [texts_array(values) for values in zip(*cells, strict=True)]
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"{name}, lines {lines[0]} to {lines[-1]}: a text holds {error.object[error.start]!r}, "
                        "half of a surrogate pair, which is no character. Correct the text or the encoding."
                    ) from None
                writer.write_batch(pa.record_batch([numbers_array(lines), *texts], schema=schema))
        with pa.ipc.open_stream(pa.memory_map(table)) as stream:
            return list(stream)


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


def _text_rows(
    source: DataSource, path: Path, kind: FileFormat, file: IO[str]
) -> tuple[tuple[str, ...], Iterator[tuple[int, Sequence[str | None]]]]:
    """Return the names of the columns, and each row: the line where it begins, from 1, and its fields."""
    if kind == "lines":
        if source.pattern is None:
            return ("text",), ((number, (line,)) for number, line in _lines(file))
        pattern = re.compile(source.pattern)
        return tuple(pattern.groupindex), _matches(pattern, path, file)
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


def _lines(file: IO[str], delimiter: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of each line that is not blank."""
    for number, line in enumerate(file, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if not _is_blank(line, delimiter):
            yield number, line


def _is_blank(line: str, delimiter: str = "") -> bool:
    """Return whether pandas skips a line: blanks and tabs alone, unless these are delimiters between empty fields."""
    return not line.strip(" \t\r\n") and (not delimiter or delimiter not in line)


def _matches(pattern: re.Pattern[str], path: Path, file: IO[str]) -> Iterator[tuple[int, Sequence[str | None]]]:
    for row, (number, line) in enumerate(_lines(file)):
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
        for number, line in _lines(file, delimiter):
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
            f"{path.name}, line {reader.line_num} is not well-formed {kind}: {error}. "
            "If quotation marks are ordinary characters there, set quoting: false."
        ) from None


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


def _read_encoding(encoding: str) -> str:
    """Return the encoding to read with: for utf-8 one that takes a byte order mark, too."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
