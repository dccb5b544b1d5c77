"""Local files into memory-mapped tables. Nothing stays on the disk: the table's file is unlinked once it is mapped."""

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
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from petals_eval.data.problems import shorten
from petals_eval.data.quiet import no_progress_bars
from petals_eval.data.source import DataSource, FileFormat, format_of
from petals_eval.errors import DataError, MachineError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["file_fingerprint", "load_file", "scratch_folder"]

_BATCH_ROWS = 2000
# What pyarrow raises for a damaged file is an OSError too, but without one of these numbers.
_MACHINE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)


def load_file(source: DataSource) -> "Dataset":
    """The rows of a local file. Memory is bounded by a batch of rows, not by the file.

    csv, tsv and lines give text columns exactly as written, so that no row and no "NA" or "null" is lost to a guess of
    types; jsonl and parquet bring types of their own. Blank lines are no rows.

    Raises DataError for a file that is missing, empty or cannot be read as its format, naming the line, and
    MachineError when this machine refuses to read it or has no room for the table.
    """
    path = Path(source.path).expanduser()
    _check_file(source, path)
    kind = source.format or format_of(source.path)
    try:
        if kind in ("jsonl", "parquet"):
            return _load_typed(source, path, kind)
        return _load_text(source, path, kind)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not {source.encoding}: {error.reason} at byte {error.object[error.start : error.end]!r}. "
            "Say how it is written, such as encoding: latin-1."
        ) from None
    except OSError as error:
        if error.errno is None:  # pyarrow's word for a damaged file
            raise DataError(
                f"{path.name} cannot be read as {kind}: {str(error).strip()[:200]} Is it complete?"
            ) from error
        raise MachineError(f"cannot read {source.path} into a table in {_scratch_parent()}: {error}.") from error


def file_fingerprint(source: DataSource) -> str:
    """SHA-256 over the file's bytes and the settings that decide which rows they become; not over its name."""
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
    with Path(source.path).expanduser().open("rb") as file:
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


def _load_typed(source: DataSource, path: Path, kind: str) -> "Dataset":
    import datasets

    options = {"encoding": source.encoding} if kind == "jsonl" else {}
    with scratch_folder() as folder, no_progress_bars():
        try:
            return datasets.load_dataset(
                "json" if kind == "jsonl" else kind,
                data_files=glob.escape(str(path.absolute())),
                split="train",
                cache_dir=folder,
                **options,
            )
        # datasets 5 lets a bare StopIteration out where a file has no row.
        except (datasets.builder.DatasetGenerationError, ValueError, TypeError, StopIteration) as error:
            cause = error.__cause__ or error
            if isinstance(cause, UnicodeDecodeError) or (isinstance(cause, OSError) and cause.errno in _MACHINE):
                raise cause from None
            problem = _first_bad_line(path, source.encoding) if kind == "jsonl" else None
            reason = problem or f"{type(cause).__name__}: {cause}"
            expected = "one JSON object a line" if kind == "jsonl" else "a parquet file"
            raise DataError(f"{path.name} cannot be read: expected {expected}; {reason}") from error


def _first_bad_line(path: Path, encoding: str) -> str | None:
    """What is wrong with the first line that is no JSON object, or None."""
    any_row = False
    with path.open(encoding=_read_encoding(encoding), newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            any_row = True
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg}): {shorten(line.rstrip())}."
            except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
                return f"line {number} cannot be read: {shorten(line.rstrip())}."
            if not isinstance(value, dict):
                return f"line {number} is no object: {shorten(line.rstrip())}."
    return None if any_row else "it has no rows."


def _load_text(source: DataSource, path: Path, kind: FileFormat) -> "Dataset":
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    # newline="\n": only "\n" ends a line. Python's own splitting would also break at \r, and str.splitlines at \x85,
    # which is an ordinary character of latin-1.
    with path.open(encoding=_read_encoding(source.encoding), newline="\n") as file, scratch_folder() as folder:
        columns, rows = _text_rows(source, path, kind, file)
        schema = pa.schema([(name, pa.string()) for name in columns])
        table = Path(folder) / "rows.arrow"
        with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(rows, _BATCH_ROWS)):
                arrays = [pa.array(values, pa.string()) for values in zip(*batch, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        with no_progress_bars():
            return datasets.Dataset.from_file(str(table))


def _text_rows(
    source: DataSource, path: Path, kind: FileFormat, file: IO[str]
) -> tuple[tuple[str, ...], Iterator[Sequence[str | None]]]:
    if kind == "lines":
        if source.pattern is None:
            return ("text",), ((line,) for _, line in _lines(file))
        pattern = re.compile(source.pattern)
        return tuple(pattern.groupindex), _matches(pattern, path, file)
    records = _records(source, path, kind, file)
    first = next(records, None)
    if first is None:
        raise DataError(f"{path.name} has no rows: it holds only blank lines.")
    names = source.column_names or tuple(first[1])
    if source.column_names is None and len(set(names)) < len(names):
        raise DataError(
            f"{path.name}: its first line should name the columns, each once; found {shorten(first[1], 200)}. "
            "If it is a row already, give column_names."
        )
    if any("\0" in name for name in names):
        raise DataError(
            f"{path.name}: the name of a column holds a zero byte: {shorten(list(names), 200)}. Is it text?"
        )
    return names, _fields(names, path, first, records)


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end), blank lines left out."""
    for number, line in enumerate(file, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip():
            yield number, line


def _matches(pattern: re.Pattern[str], path: Path, file: IO[str]) -> Iterator[Sequence[str | None]]:
    for row, (number, line) in enumerate(_lines(file)):
        match = pattern.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path.name}, row {row} (line {number}) does not match the pattern {pattern.pattern}: "
                f"{shorten(line)}. Correct the line, the pattern or the encoding."
            )
        yield tuple(match.group(name) for name in pattern.groupindex)


def _records(source: DataSource, path: Path, kind: FileFormat, file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields) of each line that is not blank."""
    delimiter = source.delimiter or ("\t" if kind == "tsv" else ",")
    quoting = source.quoting if source.quoting is not None else kind == "csv"
    if not quoting:
        for number, line in _lines(file):
            yield number, line.split(delimiter)
        return
    # strict: a quotation mark that is never closed would otherwise swallow the rest of the file as one field.
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(
            f"{path.name}, line {reader.line_num} is not well-formed {kind}: {error}. "
            "If quotation marks are ordinary characters there, set quoting: false."
        ) from None


def _fields(
    names: tuple[str, ...], path: Path, first: tuple[int, list[str]], records: Iterator[tuple[int, list[str]]]
) -> Iterator[Sequence[str]]:
    row = 0
    if tuple(first[1]) != names:
        yield _checked(names, path, row, *first)
        row = 1
    for number, fields in records:
        yield _checked(names, path, row, number, fields)
        row += 1


def _checked(names: tuple[str, ...], path: Path, row: int, number: int, fields: list[str]) -> list[str]:
    if len(fields) != len(names):
        raise DataError(
            f"{path.name}, row {row} (line {number}): expected {len(names)} columns ({', '.join(names)}), "
            f"found {len(fields)}: {shorten(fields)}. Check the delimiter and the column names."
        )
    return fields


def _read_encoding(encoding: str) -> str:
    """utf-8 with or without a byte order mark; every other encoding as it is."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
