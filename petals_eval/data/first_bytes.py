"""What a file is by its first bytes, whatever its name says."""

from pathlib import Path

__all__ = ["what_it_is"]

_BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of git lfs, not the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip: unpack it first (gunzip)",
    b"BZh": "compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as csv",
    b"ARROW1": "an Arrow file: save it as parquet, by pyarrow.parquet.write_table",
    b"PAR1": "a parquet file: give it the suffix .parquet, or say format: parquet",
    b"SQLite format 3\x00": "an SQLite database: save the table as csv",
    b"%PDF": "a PDF",
}


def what_it_is(path: Path, *expected: bytes) -> str | None:
    """Return what the file is, and what to do, where it begins as no text does; None for any other.

    expected: beginnings that are right for it. Raises OSError.
    """
    with path.open("rb") as file:
        first = file.read(max(map(len, _BEGINNINGS)))
    for beginning, meaning in _BEGINNINGS.items():
        if first.startswith(beginning) and beginning not in expected:
            return meaning
    return None
