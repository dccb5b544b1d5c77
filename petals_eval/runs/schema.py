"""The journal's tables, and what to say when SQLite cannot."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from petals_eval.errors import MachineError, PetalsEvalError, RunFolderError
from petals_eval.runs.disk import blame_the_machine

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION", "blame_sqlite", "connect"]

APPLICATION_ID = 0x50455631  # "PEV1": tells a journal from any other SQLite file
SCHEMA_VERSION = 2

# answer: the values of the prediction, float64, little-endian, item by item; the manifest names their columns.
# label and prediction are NULL where there are none.
# One valid row a key. A recomputation inserts a new row and marks the old one with its successor; nothing is deleted.
# A row can also be withdrawn without a successor (valid = 0, superseded_by NULL): its example is to be computed again.
# server_sets: most examples share one of a few sets of servers, so a row holds one number. "Everything that server S
# touched" is a join over server_set_members and the index on scored(server_set).
TABLES = """
CREATE TABLE adapters (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE servers (
    id INTEGER PRIMARY KEY, peer_id TEXT NOT NULL, first INTEGER NOT NULL, "end" INTEGER NOT NULL,
    version TEXT, dtype TEXT, quant TEXT
);
CREATE INDEX servers_by_peer ON servers (peer_id);
CREATE TABLE server_sets (id INTEGER PRIMARY KEY, members TEXT NOT NULL UNIQUE);
CREATE TABLE server_set_members (
    server_set INTEGER NOT NULL REFERENCES server_sets (id), server INTEGER NOT NULL REFERENCES servers (id),
    PRIMARY KEY (server_set, server)
) WITHOUT ROWID;
CREATE TABLE scored (
    id INTEGER PRIMARY KEY,
    adapter INTEGER NOT NULL REFERENCES adapters (id),
    key TEXT NOT NULL,
    row_hash TEXT NOT NULL,
    kind TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed')),
    label REAL,
    prediction REAL,
    answer BLOB,
    n_requests INTEGER NOT NULL,
    n_tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL,
    server_set INTEGER REFERENCES server_sets (id),
    reason TEXT,
    time REAL NOT NULL,
    valid INTEGER NOT NULL DEFAULT 1,
    superseded_by INTEGER REFERENCES scored (id),
    CHECK ((status = 'ok') = (answer IS NOT NULL)),
    CHECK ((status = 'failed') = (reason IS NOT NULL))
);
CREATE UNIQUE INDEX one_valid_row ON scored (adapter, key) WHERE valid = 1;
CREATE INDEX scored_by_servers ON scored (server_set);
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, adapter INTEGER NOT NULL REFERENCES adapters (id), started REAL NOT NULL,
    seconds REAL NOT NULL
);
"""

# What a journal of schema 1 holds, under today's names: whoever only reads needs to know of nothing else.
FIRST_SCHEMA_VIEW = """
CREATE TEMP VIEW scored AS SELECT
    id, adapter, key, '' AS row_hash, 'classification' AS kind, status, label, prediction, scores AS answer,
    1 AS n_requests, n_tokens, truncated, server_set, reason, time, valid, superseded_by
FROM main.scored
"""


def connect(path: Path, *, create: bool, read_only: bool = False) -> sqlite3.Connection:
    """Open a journal, or make one. Raises RunFolderError for a file that is none, MachineError."""
    with blame_the_machine(path):
        if not create and not path.is_file():
            raise RunFolderError(f"Expected a journal at {path}; found none. Is this the folder of a run?")
        in_use = path.with_name(f"{path.name}-wal").exists()
    mode = "ro" if read_only else "rwc" if create else "rw"
    # A journal closed in good order has no -wal file and is read as it lies, also from a medium that is read-only.
    as_it_lies = "&immutable=1" if read_only and not in_use else ""
    with blame_sqlite(path):
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}{as_it_lies}",
            uri=True,
            isolation_level=None,  # transactions are begun and ended by name
            check_same_thread=False,  # the journal has its own lock
            timeout=30,
        )
        try:
            _prepare(connection, path, create, read_only)
        except (sqlite3.Error, PetalsEvalError):
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, create: bool, read_only: bool) -> None:
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut too; there are few
        connection.execute("PRAGMA foreign_keys = ON")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if empty and application == 0 and create:
        connection.executescript(
            f"BEGIN IMMEDIATE; {TABLES} PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    elif application != APPLICATION_ID:
        raise RunFolderError(
            f"Expected a journal of petals-eval at {path}; found another program's SQLite file. "
            "Choose another folder with --out."
        )
    elif version > SCHEMA_VERSION:
        raise RunFolderError(
            f"Expected the journal {path} with schema version {SCHEMA_VERSION} or older; found {version}. "
            "A newer petals-eval wrote it: update this one, or choose another folder with --out."
        )
    elif version < SCHEMA_VERSION and read_only:
        connection.executescript(FIRST_SCHEMA_VIEW)
    elif version < SCHEMA_VERSION:
        raise RunFolderError(
            f"Expected the journal {path} with schema version {SCHEMA_VERSION}; found {version}, which can be read and "
            "not gone on with. Finish it with the version it was begun with, or choose another folder with --out."
        )


_NO_LOCKS = (
    "The file system gives no locks or no shared memory, as some network file systems (NFS, SMB): choose a local "
    "folder with --out."
)
_WHAT_TO_DO = {
    "SQLITE_FULL": "The disk is full: free some space, then run the same command again; what was scored is kept.",
    "SQLITE_READONLY": "The file or its folder is read-only: make it writable, or choose another folder with --out.",
    "SQLITE_CANTOPEN": "It cannot be opened: check the permissions of the folder, or choose another one with --out.",
    "SQLITE_IOERR": "The disk failed to read or write: check it (is it full or removed?), then run the command again.",
    "SQLITE_IOERR_LOCK": _NO_LOCKS,
    "SQLITE_IOERR_SHM": _NO_LOCKS,
    "SQLITE_PROTOCOL": _NO_LOCKS,
    "SQLITE_BUSY": "Another process holds it: wait until that run ends, or choose another folder with --out. If nobody "
    "does: is it on a network file system (NFS, SMB) that gives no locks? Then choose a local folder.",
    "SQLITE_LOCKED": "Another process holds it: wait until that run ends, or choose another folder with --out.",
    "SQLITE_PERM": "No permission: check the permissions of the folder, or choose another one with --out.",
}


@contextlib.contextmanager
def blame_sqlite(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about `path` into a MachineError or, where the file is no journal, a RunFolderError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # Extended names begin with the primary one: SQLITE_IOERR_WRITE, SQLITE_READONLY_DIRECTORY.
        code = getattr(error, "sqlite_errorname", "") or ""
        if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise RunFolderError(
                f"Expected a journal at {path}; found: {error}. Choose another folder with --out."
            ) from error
        known = max((start for start in _WHAT_TO_DO if code.startswith(start)), key=len, default=None)
        if known is None:
            raise
        raise MachineError(f"Expected to use the journal {path}; found: {error}. {_WHAT_TO_DO[known]}") from error
