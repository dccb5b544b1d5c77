"""The journal: every scored example is a row under its own key, in a transaction. Metrics come from it alone."""

import contextlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from petals_eval.errors import MachineError
from petals_eval.interrupts import deferred
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.copy_rows import copy_rows
from petals_eval.runs.lookup_tables import LookupTables
from petals_eval.runs.manifest import ServerUsed
from petals_eval.runs.rows import ComputedRows, Counts, Failure, KeyedRows, Row, packed, unpacked
from petals_eval.runs.schema import blame_sqlite, connect
from petals_eval.tasks.requests import Label, Prediction

__all__ = ["Counts", "Failure", "Journal", "commit_what_waits"]

READ_ROWS = 1024  # fetched at a time
ROWS_TOGETHER = 512  # at most in one statement


@dataclass(frozen=True, slots=True)
class CommitPolicy:
    """When rows are committed, together: a commit waits for the disk, and for a slow one a tenth of a second.

    min_seconds, share: rows wait for so long, or for as long as makes commits this share of a run.
    max_seconds, max_rows: but never longer, nor until there are more: what is not committed when the process dies is
        computed again.
    at_exit_seconds: how long a commit at the last moment waits for another thread that holds the journal.
    """

    min_seconds: float = 1.0
    max_seconds: float = 10.0
    share: float = 0.01
    max_rows: int = 4096
    at_exit_seconds: float = 1.0


COMMITS = CommitPolicy()


class Journal:
    """The SQLite file of a run.

    Safe to use from several threads. Close it, or use it as a context manager: closing commits what waits.
    Every method raises MachineError when the disk is full, read-only or failing; what was committed before stays.
    before_commit: called before rows are committed; where one of these raises, they are not.
    """

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False):
        """Raises RunFolderError where there is no journal (and `create` is False), or one of a newer release."""
        self.path = path
        self.before_commit: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._pending: list[Row] = []
        self._session: tuple[int, float] | None = None  # row, monotonic start
        self._next_commit = float("-inf")
        self._closed = False
        self._connection = connect(path, create=create, read_only=read_only)
        self._read_only = read_only
        most_values = self._connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)  # 999 in some builds
        self._rows_together = min(ROWS_TOGETHER, most_values // len(Row._fields))
        self._tables = LookupTables(self._connection)
        _OPEN.add(self)

    # -- writing

    def add(
        self,
        adapter: str,
        prediction: Prediction,
        *,
        kind: str = "classification",
        truncated: bool = False,
        servers: Sequence[ServerUsed] = (),
    ) -> None:
        """Record a scored example. A valid row of the same key is superseded; it stays for the record."""
        self._append(
            Row(
                adapter,
                tuple(servers),
                prediction.key,
                prediction.row_hash,
                kind,
                "ok",
                prediction.label,
                prediction.prediction,
                packed(prediction.values),
                prediction.n_requests,
                prediction.n_tokens,
                truncated,
                None,
                time.time(),
            )
        )

    def add_failure(
        self,
        adapter: str,
        key: str,
        label: Label,
        reason: str,
        *,
        kind: str = "classification",
        row_hash: str = "",
        n_requests: int = 1,
        n_tokens: int = 0,
        truncated: bool = False,
        servers: Sequence[ServerUsed] = (),
    ) -> None:
        """Record an example that could not be computed, and why."""
        of_row = (adapter, tuple(servers), key, row_hash, kind)
        counts = (n_requests, n_tokens, truncated)
        self._append(Row(*of_row, "failed", label, None, None, *counts, reason, time.time()))

    def withdraw(self, peer_ids: Iterable[str]) -> int:
        """Make every valid row that one of these servers took part in invalid; it stays for the record.

        Its example is to be computed again. Returns how many rows there were.
        """
        sql = f"UPDATE scored SET valid = 0 WHERE valid = 1 AND {_COMPUTED_BY}"
        with self._lock:
            self.flush()
            with self._transaction():
                return sum(self._connection.execute(sql, (peer_id,)).rowcount for peer_id in peer_ids)

    def absorb(self, others: Iterable["Journal"]) -> None:
        """Copy all rows of other journals, the superseded ones and the sessions too, in one transaction.

        No two of the journals may hold a valid row of the same adapter and key.
        """
        with self._lock, self._transaction():
            for other in others:
                copy_rows(other._select, self._connection, self._tables)

    def _append(self, row: Row) -> None:
        with self._lock:
            self._pending.append(row)
            if len(self._pending) >= COMMITS.max_rows:
                self.flush()
            else:
                self.flush_if_due()

    def flush_if_due(self) -> None:
        """Commit if rows have waited long enough. Whoever waits for the swarm calls this now and then."""
        with self._lock:
            if self._pending and time.monotonic() >= self._next_commit:
                self.flush()

    def flush(self) -> None:
        """Commit what waits, in one transaction."""
        with self._lock:
            if not self._pending and self._session is None:
                return
            began = time.monotonic()
            with deferred():
                for each in self.before_commit:
                    each()
                with self._transaction():
                    for start in range(0, len(self._pending), self._rows_together):
                        self._insert_together(self._pending[start : start + self._rows_together])
                    if self._session is not None:
                        session, started = self._session
                        seconds = time.monotonic() - started
                        self._connection.execute("UPDATE sessions SET seconds = ? WHERE id = ?", (seconds, session))
                self._pending.clear()
                ended = time.monotonic()
                rest = (ended - began) / COMMITS.share
                self._next_commit = ended + min(COMMITS.max_seconds, max(COMMITS.min_seconds, rest))

    @contextlib.contextmanager
    def session(self, adapter: str) -> Iterator[None]:
        """Measure the time of an evaluation. `seconds` adds up all sessions, also those of an interrupted run."""
        with self._lock:
            with self._transaction():
                cursor = self._connection.execute(
                    "INSERT INTO sessions (adapter, started, seconds) VALUES (?, ?, 0)",
                    (self._tables.adapter(adapter), time.time()),
                )
            self._session = (int(cursor.lastrowid or 0), time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                try:
                    self.flush()
                finally:
                    self._session = None

    def close(self) -> None:
        """Commit what waits and close the file."""
        with self._lock:
            if self._closed:
                return
            try:
                self.flush()
            finally:
                self._closed = True
                with blame_sqlite(self.path):
                    whole = self._read_only or self._is_in_one_file()
                    self._connection.close()
            if not whole:
                raise MachineError(
                    f"{self.path} is complete only together with {self.path.name}-wal beside it: there was no room to "
                    "join them. Nothing is lost: keep them together, or free some space and open the run once more."
                )

    def _is_in_one_file(self) -> bool:
        """Bring all that was committed into the file itself, and return whether that could be done: SQLite, when it
        closes a file, says nothing of a full disk."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError as error:
            if (error.sqlite_errorname or "").startswith(("SQLITE_FULL", "SQLITE_IOERR")):
                return False
            raise
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second "the disk is full" would hide the first.
        with contextlib.suppress(MachineError) if isinstance(error, MachineError) else contextlib.nullcontext():
            self.close()

    # -- reading; all of it commits first, so that what was added is seen

    def adapters(self) -> list[str]:
        """Return the names of the adapters, in the order of their first row."""
        return [name for (name,) in self._select("SELECT name FROM adapters ORDER BY id")]

    def done_keys(self, adapter: str) -> set[str]:
        """Return the keys that need no computing: those of failed examples do, for a resumed run tries them again."""
        sql = f"SELECT key {_VALID} AND status = 'ok'"
        return {key for (key,) in self._select(sql, (adapter,))}

    def scored_keys(self, adapter: str) -> Iterator[str]:
        """Yield the keys of the scored examples, in source order."""
        return (key for (key,) in self._select(f"SELECT key {_VALID} AND status = 'ok' {_IN_ORDER}", (adapter,)))

    def keys(self, adapter: str) -> Iterator[str]:
        """Yield the keys of all valid rows, the failed ones too."""
        return (key for (key,) in self._select(f"SELECT key {_VALID}", (adapter,)))

    def keys_computed_by(self, adapter: str, peer_ids: Iterable[str]) -> set[str]:
        """Return the keys of an adapter's valid rows that one of these servers computed a part of."""
        sql = f"SELECT key {_VALID} AND {_COMPUTED_BY}"
        return {key for peer_id in peer_ids for (key,) in self._select(sql, (adapter, peer_id))}

    def is_blank(self) -> bool:
        """Return whether nothing was ever scored; a row that was withdrawn was scored."""
        return next(self._select("SELECT NOT EXISTS (SELECT 1 FROM scored WHERE status = 'ok')"))[0] == 1

    def committed(self) -> int:
        """Count the valid scored rows on the disk, without those that wait: a full disk can still be read."""
        with self._lock, blame_sqlite(self.path):
            sql = "SELECT count(*) FROM scored WHERE valid = 1 AND status = 'ok'"
            return int(self._connection.execute(sql).fetchone()[0])

    def counts(self, adapter: str) -> Counts:
        """Count an adapter's valid rows."""
        sql = (
            "SELECT count(*), coalesce(sum(status = 'ok'), 0), coalesce(sum(status = 'ok' AND truncated), 0),"
            f" coalesce(sum(CASE status WHEN 'ok' THEN n_tokens END), 0) {_VALID}"
        )
        total, scored, truncated, n_tokens = next(self._select(sql, (adapter,)))
        return Counts(scored, total - scored, truncated, n_tokens)

    def seconds(self, adapter: str) -> float:
        """Return the time spent evaluating, over all sessions."""
        sql = (
            "SELECT coalesce(sum(seconds), 0.0) FROM sessions WHERE adapter = (SELECT id FROM adapters WHERE name = ?)"
        )
        return float(next(self._select(sql, (adapter,)))[0])

    def predictions(self, adapter: str, columns: int = 1) -> Iterator[Prediction]:
        """Yield the scored examples in source order, a few in memory at a time. columns: of their values."""
        sql = (
            f"SELECT key, label, prediction, answer, n_tokens, n_requests, row_hash {_VALID} AND status = 'ok' "
            f"{_IN_ORDER}"
        )
        for key, label, prediction, answer, *rest in self._select(sql, (adapter,)):
            yield Prediction(key, label, prediction, unpacked(answer, columns), *rest)

    def predictions_of(self, adapter: str, keys: Sequence[str], columns: int = 1) -> dict[str, Prediction]:
        """Return those of these examples that are scored, by key. keys: some hundreds. columns: of the values."""
        sql = (
            f"SELECT key, label, prediction, answer, n_tokens, n_requests, row_hash {_VALID} AND status = 'ok' "
            f"AND key IN ({', '.join('?' * len(keys))})"
        )
        return {
            key: Prediction(key, label, prediction, unpacked(answer, columns), *rest)
            for key, label, prediction, answer, *rest in self._select(sql, (adapter, *keys))
        }

    def failures(self, adapter: str) -> Iterator[Failure]:
        """Yield the examples that could not be computed, in source order."""
        sql = f"SELECT key, label, reason, row_hash {_VALID} AND status = 'failed' {_IN_ORDER}"
        return (Failure(*row) for row in self._select(sql, (adapter,)))

    def scored_rows(self, adapter: str, columns: Sequence[str] = ("score",)) -> ScoredRows:
        """Return what metrics are computed from, in source order: that of computing changes no digit of an interval.

        columns: the names of the values' columns. Raises DataError where values do not fit them.
        """
        sql = f"SELECT label, prediction, answer {_VALID} AND status = 'ok' {_IN_ORDER}"
        return ScoredRows.of(self._select(sql, (adapter,)), columns)

    def lengths(self, adapter: str) -> np.ndarray:
        """Return the text tokens of the scored rows, int64 (n,), in source order."""
        sql = f"SELECT n_tokens {_VALID} AND status = 'ok' {_IN_ORDER}"
        return np.fromiter((count for (count,) in self._select(sql, (adapter,))), dtype=np.int64)

    def keyed_rows(self, adapter: str, columns: Sequence[str] = ("score",)) -> KeyedRows:
        """Return the scored rows with keys and hashes, in source order. Raises DataError as `scored_rows` does."""
        sql = f"SELECT key, row_hash, label, prediction, answer {_VALID} AND status = 'ok' {_IN_ORDER}"
        keys: list[str] = []
        hashes: list[str] = []

        def rows() -> Iterator[tuple[float | None, float | None, bytes]]:
            for key, row_hash, *rest in self._select(sql, (adapter,)):
                keys.append(key)
                hashes.append(row_hash)
                yield tuple(rest)

        scored = ScoredRows.of(rows(), columns)
        return KeyedRows(tuple(keys), tuple(hashes), scored)

    def computed_rows(self, adapter: str) -> ComputedRows:
        """Return how the scored rows were computed, in source order."""
        sql = f"SELECT n_tokens, truncated, server_set {_VALID} AND status = 'ok' {_IN_ORDER}"
        rows = list(self._select(sql, (adapter,)))
        sets = np.array([-1 if server_set is None else server_set for *_, server_set in rows], dtype=np.int64)
        members: dict[ServerUsed, list[int]] = {}
        sql = (
            'SELECT server_set, s.peer_id, s.first, s."end", s.version, s.dtype, s.quant FROM server_set_members'
            " JOIN servers AS s ON s.id = server ORDER BY s.first, s.id"
        )
        for server_set, *server in self._select(sql):
            members.setdefault(ServerUsed(*server), []).append(server_set)
        took_part = {server: np.isin(sets, of) for server, of in members.items()}
        return ComputedRows(
            np.array([n_tokens for n_tokens, *_ in rows], dtype=np.int64),
            np.array([bool(truncated) for _, truncated, _ in rows], dtype=np.bool_),
            {server: took for server, took in took_part.items() if took.any()},
        )

    def servers(self) -> list[tuple[ServerUsed, int]]:
        """Return the servers that computed valid rows, each with how many, most first."""
        sql = (
            'SELECT s.peer_id, s.first, s."end", s.version, s.dtype, s.quant, count(*) AS n FROM scored'
            " JOIN server_set_members USING (server_set) JOIN servers AS s ON s.id = server WHERE valid = 1"
            " GROUP BY s.id ORDER BY n DESC, s.first, s.peer_id"
        )
        return [(ServerUsed(*row[:-1]), row[-1]) for row in self._select(sql)]

    # -- inside

    def _select(self, sql: str, parameters: Sequence[object] = ()) -> Iterator[tuple]:
        with self._lock, blame_sqlite(self.path):
            self.flush()
            cursor = self._connection.execute(sql, tuple(parameters))
        while True:
            with self._lock, blame_sqlite(self.path):
                rows = cursor.fetchmany(READ_ROWS)
            if not rows:
                return
            yield from rows

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with blame_sqlite(self.path), deferred():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._tables.forget()
                if self._connection.in_transaction:  # SQLite rolls back by itself when the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def _insert_together(self, rows: Sequence[Row]) -> None:
        """Insert rows in one statement: for each, Python lets other threads run and waits for its turn again."""
        every = [self._values(row) for row in rows]
        sql = f"{_INSERT} VALUES {', '.join([_MARKS] * len(rows))}"
        try:
            self._connection.execute(sql, [value for values in every for value in values])
        except sqlite3.IntegrityError:  # there is a valid row of one of these keys
            for values in every:
                self._insert(values)

    def _values(self, row: Row) -> tuple[object, ...]:
        return (self._tables.adapter(row.adapter), self._tables.server_set(row.server_set), *row[2:])

    def _insert(self, values: tuple[object, ...]) -> None:
        """Insert one row; what was valid of its key before is superseded."""
        execute = self._connection.execute
        sql = f"{_INSERT} VALUES {_MARKS}"
        try:
            execute(sql, values)
        except sqlite3.IntegrityError:
            adapter, key, time = values[0], values[2], values[-1]
            same = "SELECT id, time FROM scored WHERE adapter = ? AND key = ? AND valid = 1"
            old, written = execute(same, (adapter, key)).fetchone() or (None, None)
            if old is None:
                raise
            if written == time:
                return  # this very row: an interrupt came between its commit and our taking note
            execute("UPDATE scored SET valid = 0 WHERE id = ?", (old,))
            new = execute(sql, values).lastrowid
            execute("UPDATE scored SET superseded_by = ? WHERE id = ?", (new, old))


def commit_what_waits() -> None:
    """Commit what waits in every open journal. Whoever ends this process without ceremony calls this."""
    for journal in list(_OPEN):
        if journal._lock.acquire(timeout=COMMITS.at_exit_seconds):
            # It may be closed, or its disk full: there is nothing else to be done.
            with contextlib.suppress(MachineError, sqlite3.Error):
                journal.flush()
            journal._lock.release()


_OPEN: "weakref.WeakSet[Journal]" = weakref.WeakSet()
_INSERT = f"INSERT INTO scored ({', '.join(Row._fields)})"
_MARKS = f"({', '.join('?' * len(Row._fields))})"
_VALID = "FROM scored WHERE adapter = (SELECT id FROM adapters WHERE name = ?) AND valid = 1"
_COMPUTED_BY = (
    "server_set IN (SELECT server_set FROM server_set_members JOIN servers ON servers.id = server WHERE peer_id = ?)"
)
# Keys are positions in the source, as text. Others sort after their number, or by their letters.
_IN_ORDER = "ORDER BY CAST(key AS INTEGER), key"
