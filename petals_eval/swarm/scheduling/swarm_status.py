"""What a person is shown of the work under way. Data alone."""

from dataclasses import dataclass

from petals_eval.swarm.peers.finding import TrustFinding

__all__ = ["SwarmStatus"]


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """What a progress display shows.

    waiting: why nothing moves, or None. notices: warnings, in order; each is to be shown once.
    findings: servers whose answers cannot be counted on.
    """

    retries: int
    servers: tuple[str, ...]
    waiting: str | None
    notices: tuple[str, ...] = ()
    findings: tuple[TrustFinding, ...] = ()
