"""Examples whose answers nobody could settle: those that servers in dispute took part in."""

from collections.abc import Iterable

from petals_eval.runs.journal import Journal
from petals_eval.runs.manifest import NoisyServer

__all__ = ["disputed_keys"]


def disputed_keys(journal: Journal, adapter: str, servers: Iterable[NoisyServer]) -> set[str]:
    """Keys of an adapter's valid rows that disputed ones of these servers computed a part of. Raises MachineError."""
    sql = (
        "SELECT key FROM scored WHERE adapter = (SELECT id FROM adapters WHERE name = ?) AND valid = 1 AND"
        " server_set IN (SELECT server_set FROM server_set_members JOIN servers ON servers.id = server"
        " WHERE peer_id = ?)"
    )
    disputed = {each.peer_id for each in servers if each.verdict == "disputed"}
    return {key for peer_id in disputed for (key,) in journal._select(sql, (adapter, peer_id))}
