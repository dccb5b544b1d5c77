"""texts.jsonl: the texts that a run generated, in a file of their own, and only where somebody asked for them.

While a run goes on, a text is written before the journal's row that it belongs to is committed. So a row that is there
has its text, whenever the process dies; a text without a row is computed again like its row, and then the later line
counts. When the run is finished the file is put in the order of the rows, without what does not count.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from petals_eval.errors import RunFolderError
from petals_eval.runs.disk import blame_the_machine, write_atomically
from petals_eval.tasks.requests import Finish, Prediction

__all__ = ["TEXTS_FILE", "TEXTS_SCHEMA", "TextFile"]

TEXTS_FILE = "texts.jsonl"
TEXTS_SCHEMA = 2

_Key = tuple[str, str]  # adapter, key


class TextFile:
    """Safe to use from several threads.

    Every method raises MachineError where the disk is full, read-only or failing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._is_on_disk = True

    def add(self, adapter: str, prediction: Prediction) -> None:
        """Write a generated text; `flush` sees to it that it is on the disk."""
        line = {
            "schema_version": TEXTS_SCHEMA,
            "adapter": adapter,
            "key": prediction.key,
            "row_hash": prediction.row_hash,
            "text": prediction.text,
            "finish": prediction.finish,
        }
        self._write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Return once all that was added is on the disk."""
        with self._lock, blame_the_machine(self.path):
            if self._file is not None and not self._is_on_disk:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._is_on_disk = True

    def absorb(self, other: "TextFile") -> None:
        """Copy the lines of another file."""
        for _, line in other._whole_lines():
            self._write(line)
        self.flush()

    def texts(self, adapter: str) -> dict[str, str]:
        """Return an adapter's texts by their key, the latest of each.

        Raises RunFolderError for a file of another kind.
        """
        return {key: text for key, (text, _) in self.generated(adapter).items()}

    def generated(self, adapter: str) -> dict[str, tuple[str, Finish | None]]:
        """Return an adapter's texts and why each ends, by their key. Raises RunFolderError as `texts` does."""
        self.flush()
        return {key: found for _, (name, key), found in self._entries() if name == adapter}

    def put_in_order(self, keys: Iterable[_Key]) -> None:
        """Leave the texts of these rows alone, in this order. Raises RunFolderError for a file of another kind."""
        self.close()
        starts = {key: start for start, key, _ in self._entries()}

        def lines() -> Iterator[str]:
            if starts:
                with self.path.open("rb") as file:
                    for key in keys:
                        if key in starts:
                            file.seek(starts[key])
                            yield file.readline().decode()

        write_atomically(self.path, lines())

    def close(self) -> None:
        self.flush()
        with self._lock, blame_the_machine(self.path):
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, line: bytes) -> None:
        with self._lock, blame_the_machine(self.path):
            if self._file is None:
                self._file = self.path.open("ab")
                self._file.truncate(self._whole())  # what a process wrote last when it was killed
            self._file.write(line)
            self._is_on_disk = False

    def _whole(self) -> int:
        """Return how many bytes there are up to the end of the last whole line."""
        return sum(len(line) for _, line in self._whole_lines())

    def _whole_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield where each line starts, and the line, as far as they are whole."""
        with blame_the_machine(self.path):
            if not self.path.is_file():
                return
            with self.path.open("rb") as file:
                start = 0
                for line in file:
                    if line.endswith(b"\n"):
                        yield start, line
                    start += len(line)

    def _entries(self) -> Iterator[tuple[int, _Key, tuple[str, Finish | None]]]:
        """Yield where each whole line starts, what it belongs to, and its text with why it ends."""
        for start, line in self._whole_lines():
            try:
                found = json.loads(line)
                yield start, (str(found["adapter"]), str(found["key"])), (str(found["text"]), found.get("finish"))
            except (ValueError, TypeError, LookupError) as error:
                raise RunFolderError(f"Expected a text a line in {self.path}; found something else: {error}.") from None
