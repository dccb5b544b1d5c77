"""The journal's lookup tables: adapters, servers, and sets of servers that computed something together.

A row of the journal holds their ids.
"""

import sqlite3
from collections.abc import Iterable, Sequence

from petals_eval.runs.manifest import ServerUsed

__all__ = ["LookupTables"]


class LookupTables:
    """The ids of what rows refer to, made where there are none; used inside transactions of the journal alone."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self._ids: dict[object, int] = {}

    def forget(self) -> None:
        """Forget all ids: those that a failed transaction made are gone with it."""
        self._ids.clear()

    def adapter(self, name: str) -> int:
        """Return the id of an adapter's name."""
        return self._id(("adapter", name), "adapters", "name = ?", ("name",), (name,))

    def server_set(self, servers: Iterable[ServerUsed]) -> int | None:
        """Return the id of a set of servers; None for no servers."""
        used = frozenset(servers)
        known = self._ids.get(used)
        if known is not None or not used:
            return known
        members = sorted(self._server(server) for server in used)
        text = ",".join(map(str, members))
        identity = self._id(used, "server_sets", "members = ?", ("members",), (text,))
        self._connection.executemany(
            "INSERT OR IGNORE INTO server_set_members VALUES (?, ?)", [(identity, member) for member in members]
        )
        return identity

    def _server(self, server: ServerUsed) -> int:
        columns = ("peer_id", "first", '"end"', "version", "dtype", "quant")
        values = (server.peer_id, server.first, server.end, server.version, server.dtype, server.quant)
        same = " AND ".join(f"{column} IS ?" for column in columns)  # IS: unknown equals unknown
        return self._id(server, "servers", same, columns, values)

    def _id(self, cached: object, table: str, same: str, columns: Sequence[str], values: tuple[object, ...]) -> int:
        if cached not in self._ids:
            found = self._connection.execute(f"SELECT id FROM {table} WHERE {same}", values).fetchone()
            if found is None:
                marks = ", ".join("?" * len(columns))
                sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
                found = (self._connection.execute(sql, values).lastrowid,)
            self._ids[cached] = int(found[0] or 0)
        return self._ids[cached]
