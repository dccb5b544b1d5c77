"""Tables on the disk while they are being written. Nothing stays: a table's file is unlinked once it is mapped."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

__all__ = ["mapped", "scratch_folder", "scratch_parent"]


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for tables while they are being written, in `scratch_parent()`.

    It is removed at the end of the block. On Linux and macOS a mapped file lives on, without a name, until it is
    unmapped.
    """
    if os.environ.get("HF_DATASETS_CACHE"):
        Path(scratch_parent()).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="petals-eval-rows-", dir=scratch_parent()) as folder:
        yield folder


def scratch_parent() -> str:
    """Return where tables are written: HF_DATASETS_CACHE if it is set, else where temporary files go."""
    return os.environ.get("HF_DATASETS_CACHE") or tempfile.gettempdir()


def mapped(schema: "Schema", batches: "Iterable[RecordBatch]") -> "list[RecordBatch]":
    """Return these batches, memory-mapped: memory is bounded by one of them. Raises OSError.

    By pyarrow alone: `datasets`, and pandas with it, would take a second to import.
    """
    import pyarrow as pa

    with scratch_folder() as folder:
        table = str(Path(folder) / "rows.arrow")
        with pa.OSFile(table, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                del batch  # or it would be there until the next one is made
        with pa.ipc.open_stream(pa.memory_map(table)) as stream:
            return list(stream)
