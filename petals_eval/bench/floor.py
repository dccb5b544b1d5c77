"""The floor under a run's time: what no client can go below on these links and servers."""

from collections.abc import Sequence
from dataclasses import dataclass

from petals_eval.local_swarm.network import LinkProfile, LinkUse

__all__ = ["Floor", "link_seconds", "pass_seconds"]


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that each part needs for its share of the work if nothing ever waits.

    link: the busiest direction of any link, its bytes over its rate.
    latency: one pass along the route: the delays of every hop, there and back.
    servers: processor time of the servers: that of the busiest, or that of all shared by the machine's processors.
    client: the client's own processor time.
    """

    link: float
    latency: float
    servers: float
    client: float

    @property
    def largest(self) -> tuple[str, float]:
        """
        >>> Floor(link=0.34, latency=0.12, servers=0.2, client=0.1).largest
        ('link', 0.34)
        """
        parts = {"link": self.link, "latency": self.latency, "servers": self.servers, "client": self.client}
        name = max(parts, key=lambda each: parts[each])
        return name, parts[name]


def link_seconds(use: Sequence[LinkUse]) -> float:
    """Return how many seconds the busiest direction of these links was busy."""
    return max((max(each.busy_up, each.busy_down) for each in use), default=0.0)


def pass_seconds(links: Sequence[LinkProfile]) -> float:
    """Return the delays of one pass along a route of these links: every answer comes back before the next hop.

    >>> pass_seconds([LinkProfile(delay=0.02)] * 3)
    0.12
    """
    return sum(2 * link.delay for link in links)
