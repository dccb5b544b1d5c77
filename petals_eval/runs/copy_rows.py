"""Copying one journal's rows into another, as they are."""

import sqlite3
from collections.abc import Callable, Iterator

from petals_eval.runs.lookup_tables import LookupTables
from petals_eval.runs.manifest import ServerUsed

__all__ = ["copy_rows"]

_COLUMNS = (
    "key, row_hash, kind, status, label, prediction, answer, n_requests, n_tokens, truncated, reason, time, valid"
)
_MARKS = ", ".join("?" * (4 + len(_COLUMNS.split(","))))


def copy_rows(select: Callable[[str], Iterator[tuple]], connection: sqlite3.Connection, tables: LookupTables) -> None:
    """Copy every row of a journal, the superseded ones and the sessions too; inside a transaction.

    select: asks the journal that is copied from. connection, tables: those of the one that is copied to.
    """
    adapters = {number: tables.adapter(name) for number, name in select("SELECT id, name FROM adapters ORDER BY id")}
    members: dict[int, list[ServerUsed]] = {}
    for number, *server in select(
        'SELECT server_set, peer_id, first, "end", version, dtype, quant FROM server_set_members'
        " JOIN servers ON servers.id = server"
    ):
        members.setdefault(number, []).append(ServerUsed(*server))
    sets = {number: tables.server_set(servers) for number, servers in members.items()}
    above = connection.execute("SELECT coalesce(max(id), 0) FROM scored").fetchone()[0]
    copy = f"INSERT INTO scored (id, adapter, server_set, superseded_by, {_COLUMNS}) VALUES ({_MARKS})"
    # The latest first: a row names its successor, which must be there.
    every = f"SELECT id, adapter, server_set, superseded_by, {_COLUMNS} FROM scored ORDER BY id DESC"
    for number, adapter, servers, successor, *rest in select(every):
        after = None if successor is None else above + successor
        connection.execute(copy, (above + number, adapters[adapter], sets.get(servers), after, *rest))
    for adapter, *rest in select("SELECT adapter, started, seconds FROM sessions"):
        connection.execute(
            "INSERT INTO sessions (adapter, started, seconds) VALUES (?, ?, ?)", (adapters[adapter], *rest)
        )
