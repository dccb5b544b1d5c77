"""Where labelled rows come from, and how their file is read."""

import re
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from petals_eval.data.first_bytes import PACKED_SUFFIXES
from petals_eval.environment import local_path
from petals_eval.errors import DataError
from petals_eval.validation import explain

__all__ = ["DataSource", "FileFormat", "FileReading", "format_of", "is_local"]

FileFormat = Literal["csv", "tsv", "jsonl", "parquet", "arrow", "lines"]

_SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "lines",
}


class FileReading(BaseModel):
    """How a local file turns into rows.

    column_names: for csv and tsv without a header line. A first line that repeats exactly these names is a header
        all the same, and is no row.
    delimiter: one character between the fields; a comma for csv and a tab for tsv unless given.
    quoting: whether "..." may enclose a field, with delimiters and line ends in it. Unless given, on for csv and off
        for tsv, where a quotation mark is a character like any other.
    pattern: for lines, a regular expression with named groups; it must match a whole line; its groups are the columns.
        Without a pattern a line is one column, `text`.
    encoding: as Python names it; utf-8 may begin with a byte order mark.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column_names: tuple[str, ...] | None = None
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    quoting: bool | None = None
    pattern: str | None = None
    encoding: str = "utf-8"

    @field_validator("column_names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError("should be at least one name, each only once")
        return names

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"should be a regular expression ({error})") from None
        if not groups:
            raise ValueError("should have named groups, such as (?P<label>\\S+) (?P<text>.*): they become the columns")
        return pattern

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError:
            raise ValueError("should be an encoding that Python knows, such as utf-8 or latin-1") from None
        return encoding


def _as_text(path: object) -> object:
    return fspath(path) if isinstance(path, PathLike) else path


class DataSource(FileReading):
    """A data set on the Hugging Face hub, or a local file. A wrong value raises DataError.

    path: a hub name (owner/name), a local file, or a local folder laid out like a hub data set.
    subset, split, revision: of a hub data set (or folder). token: for one that is private or gated; never shown.
    format: how a local file is read; None goes by its suffix: .csv, .tsv, .jsonl (.json), .parquet, .arrow; all others:
        lines. Behind it .gz, .bz2 or .xz may follow. What begins as a parquet or an Arrow file is one.
    The other settings are those of `FileReading` and apply to local files.
    """

    path: Annotated[str, BeforeValidator(_as_text)] = Field(min_length=1)
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    token: SecretStr | None = None
    format: FileFormat | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_wrong(cls, values: Any, handler: ModelWrapValidatorHandler["DataSource"]) -> "DataSource":
        try:
            return handler(values)
        except ValidationError as error:
            raise DataError(f"this data source cannot be used:\n{explain(error, cls)}") from None


def format_of(path: str) -> FileFormat:
    """Return the format that a file's suffix stands for, that of compression apart; lines for one that is not known."""
    return _SUFFIXES.get(_suffix(path), "lines")


def _suffix(path: str) -> str:
    first, last = ("", "", *(each.lower() for each in Path(path).suffixes))[-2:]
    return first if last in PACKED_SUFFIXES else last


def is_local(source: DataSource) -> bool:
    """Return whether `source` is meant to be on this machine: it exists, or is written as only a path can be."""
    path = local_path(source.path)
    return (
        path.exists()
        or source.format is not None
        or _suffix(source.path) in _SUFFIXES
        or source.path.startswith(("/", "./", "../", "~"))
    )
