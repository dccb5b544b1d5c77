"""What is known of a server's lanes: whether they go back, and until when none is opened. No I/O."""

from petals_eval.swarm.tasks import Once

__all__ = ["LaneStanding"]


class LaneStanding:
    """One server's lanes.

    goes_back: whether its first answer after going back was that of a forward call; asked once.
    rest_until: until when no lane is opened there, on the runtime's clock.
    """

    def __init__(self) -> None:
        self.goes_back: Once[bool] = Once()
        self.rest_until = 0.0
        self._rest = 0.0  # seconds, the last time

    def on_used(self) -> None:
        """Count a micro-batch that went through."""
        self._rest = 0.0

    def on_lost(self, now: float, first_rest: float, longest_rest: float) -> None:
        """Open no lane for a while, and longer each time. Those that are lost together are lost once."""
        if self.rest_until <= now:
            self._rest = min(longest_rest, max(first_rest, 2 * self._rest))
            self.rest_until = now + self._rest
