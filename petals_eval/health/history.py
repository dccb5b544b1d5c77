"""The history keeps the looks of the last days in SQLite; uptime is reckoned from it."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from petals_eval.errors import MachineError
from petals_eval.health.results import HealthReport, Verdict

__all__ = ["DAY", "History", "Uptime"]

DAY = 86400.0
"""Seconds of a day."""
_MAX_AGE = 7 * DAY  # of a look that is kept
_SLOTS = 48  # of a day, half an hour each


@dataclass(frozen=True, slots=True)
class Uptime:
    """A model over the last day, or since it is looked at.

    looks: how many the numbers come from. seconds: since the first of them. blocks: by block, the share of looks in
    which a usable server held it. slots: the worst verdict of each half hour of a day, oldest first; None where nobody
    looked.
    """

    looks: int
    seconds: float
    blocks: tuple[float, ...]
    slots: tuple[Verdict | None, ...]


class History:
    """One table with a row for each model of each look. Safe to use from several threads.

    Raises MachineError where the file cannot be used.
    """

    def __init__(self, path: Path | None):
        """path: None keeps it in memory."""
        self._path = path
        self._lock = threading.Lock()
        with self._machine_errors():
            self._database = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS looks (time REAL, model TEXT, verdict TEXT, replicas BLOB)"
            )
            self._database.execute("CREATE INDEX IF NOT EXISTS by_model ON looks (model, time)")
            self._database.commit()

    def add(self, report: HealthReport) -> None:
        """Keep what a look found."""
        rows = [
            (report.time, model.name, model.verdict.value, bytes(min(count, 255) for count in model.replicas))
            for model in report.models
        ]
        self._write(report.time, rows)

    def add_failure(self, time: float) -> None:
        """Keep that a look could not reach the swarm: every model seen in the last day is unknown then."""
        with self._lock, self._machine_errors():
            found = self._database.execute("SELECT DISTINCT model FROM looks WHERE time > ?", (time - DAY,)).fetchall()
        self._write(time, [(time, name, Verdict.UNKNOWN.value, b"") for (name,) in found])

    def _write(self, time: float, rows: list[tuple[float, str, str, bytes]]) -> None:
        with self._lock, self._machine_errors(), self._database:
            self._database.executemany("INSERT INTO looks VALUES (?, ?, ?, ?)", rows)
            self._database.execute("DELETE FROM looks WHERE time < ?", (time - _MAX_AGE,))

    def uptime(self, model: str, num_blocks: int, now: float) -> Uptime:
        """Return a model's uptime. now: seconds since the epoch.

        A look that did not reach the swarm says nothing about its blocks.
        """
        with self._lock, self._machine_errors():
            rows = self._database.execute(
                "SELECT time, verdict, replicas FROM looks WHERE model = ? AND time > ? AND time <= ? ORDER BY time",
                (model, now - DAY, now),
            ).fetchall()
        held = [0] * num_blocks
        looks = 0
        slots: list[Verdict | None] = [None] * _SLOTS
        for time, verdict, replicas in rows:
            if len(replicas) == num_blocks:
                looks += 1
                for block, count in enumerate(replicas):
                    held[block] += count > 0
            slot = min(_SLOTS - 1, max(0, int((time - (now - DAY)) / (DAY / _SLOTS))))
            found, before = Verdict(verdict), slots[slot]
            slots[slot] = found if before is None or found.badness > before.badness else before
        seconds = now - rows[0][0] if rows else 0.0
        return Uptime(len(rows), seconds, tuple(count / looks for count in held) if looks else (), tuple(slots))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _machine_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise MachineError(
                f"the history {self._path or 'in memory'} cannot be used: {error}. Give another file with --history."
            ) from error
