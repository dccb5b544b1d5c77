"""Labelled rows from the hub or local files, reproducible samples of them, and micro-batches."""

from petals_eval.data.batching import HasTokens, MicroBatch, micro_batches
from petals_eval.data.prepared import PreparedRows
from petals_eval.data.rows import Row, Rows, load_rows, name_of, rows_of
from petals_eval.data.sampling import sample
from petals_eval.data.source import DataSource, FileFormat, FileReading, format_of, is_local

__all__ = [
    "DataSource",
    "FileFormat",
    "FileReading",
    "HasTokens",
    "MicroBatch",
    "PreparedRows",
    "Row",
    "Rows",
    "format_of",
    "is_local",
    "load_rows",
    "micro_batches",
    "name_of",
    "rows_of",
    "sample",
]
