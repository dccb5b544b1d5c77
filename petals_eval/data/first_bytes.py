"""What a file is by its first bytes, whatever its name says, and what it holds where it is compressed."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["ARROW", "PACKED_SUFFIXES", "PARQUET", "PICKLED", "DamagedError", "open_unpacked", "what_it_is"]

PARQUET = (b"PAR1",)
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
"""How an Arrow file begins, and the stream that `datasets` keeps under the same suffix."""
PICKLED = tuple(b"\x80%c" % protocol for protocol in range(2, 6))

_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_BZIP2 = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))
_UNPACKING: dict[bytes, Callable[..., Any]] = {
    _GZIP: gzip.open,
    _XZ: lzma.open,
    **dict.fromkeys(_BZIP2, bz2.open),
}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz")

_BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of git lfs, not the file itself: run `git lfs pull`",
    _GZIP: "compressed with gzip: unpack it first (gunzip)",
    **dict.fromkeys(_BZIP2, "compressed with bzip2: unpack it first (bunzip2)"),
    _XZ: "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it first (unlz4)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!\x1a\x07": "a rar archive: unpack it first",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as csv",
    b"PAR1": "a parquet file: give it the suffix .parquet, or say format: parquet",
    b"PARE": "an encrypted parquet file: decrypt it first",
    b"ARROW1": "an Arrow file: give it the suffix .arrow, or say format: arrow",
    b"\xff\xff\xff\xff": "an Arrow stream: give it the suffix .arrow, or say format: arrow",
    b"FEA1": "a file of the first version of Feather: save it as parquet",
    b"Obj\x01": "an Avro file: save it as parquet",
    b"\x89HDF": "an HDF5 file: save it as parquet",
    **dict.fromkeys(PICKLED, "a pickle of Python: save it as parquet"),
    b"SQLite format 3\x00": "an SQLite database: save the table as csv",
    b"%PDF": "a PDF",
}
_TAR, _TAR_AT = b"ustar", 257


class DamagedError(Exception):
    """Compressed data cannot be unpacked."""


def what_it_is(file: IO[bytes], *expected: bytes) -> str | None:
    """Return what a file is, and what to do, where it begins as no text does; None for any other.

    expected: beginnings that are right for it. Raises OSError.
    """
    first = file.read(_TAR_AT + len(_TAR))
    for beginning, meaning in _BEGINNINGS.items():
        if first.startswith(beginning) and beginning not in expected:
            return meaning
    return "a tar archive: unpack it first (tar -xf)" if first[_TAR_AT:] == _TAR else None


@contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; of one that is compressed with gzip, bzip2 or xz, what was compressed.

    Raises OSError, and DamagedError where it cannot be unpacked, also out of the block.
    """
    with path.open("rb") as file:
        first = file.read(max(map(len, _UNPACKING)))
        file.seek(0)
        unpack = next((each for beginning, each in _UNPACKING.items() if first.startswith(beginning)), None)
        if unpack is None:
            yield file
            return
        try:
            with unpack(file) as unpacked:
                yield unpacked
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            if error.errno is None:  # bzip2's word for it
                raise DamagedError(str(error)) from error
            raise
