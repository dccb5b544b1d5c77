"""How large a micro-batch should be, found out from what comes back. Pure bookkeeping, no I/O.

Each call costs something whatever it carries, on the server (4 ms of a processor were measured on a real one) and at
home, so larger is better. But a message above libp2p's stream window waits for the other side's leave to send the rest:
one more round trip, behind all that is on its way back. Measured with a bare echo over 100 Mbit/s and 20 ms each way:
messages of 128 to 240 KiB fill 96% of the link, those of 256 KiB 46%, however many are in flight. So micro-batches
start just below the window, or at twice that where all servers are near and a round trip costs nothing (an eighth less
time without an emulated network); another size is kept only where it brings more.
"""

from dataclasses import dataclass

__all__ = ["LARGEST", "SMALLEST", "START", "MicroBatchSize"]

START = 240 << 10
"""Bytes: libp2p's window of 256 KiB, less what a message has beside its tensor (a few deep prompts among it)."""
NEAR, NEAR_START = 0.05, 2 * START
"""Seconds a small question takes to the farthest server, and where sizes start when it is no more."""
SMALLEST, LARGEST = 64 << 10, 1 << 20
"""Bytes: below, calls cost more than what they carry; above, Petals' servers want the streaming call."""
STEP = 1.5
BETTER = 1.15
"""Another size must be so many times as fast: the pace of shared machines and links is no steadier than that."""
EPOCH_SECONDS, EPOCH_MICRO_BATCHES = 3.0, 32
"""What one size is measured over."""
FIRST_REST, LONGEST_REST = 4, 64
"""Epochs before a trial: what short runs never come to, for a size above libp2p's window may cost a third of the pace
while it is tried. As many again after a trial that brought nothing, then twice as many each time."""


@dataclass(slots=True)
class _Epoch:
    """What has come back at one size."""

    since: float | None = None
    positions: int = 0
    micro_batches: int = 0


class MicroBatchSize:
    """Climbs to the size in bytes that brings most positions per second."""

    def __init__(self) -> None:
        self.bytes = START
        self._has_begun = False
        self._best_rate: float | None = None  # at the size in use, unless a trial is on
        self._trial_of: int | None = None  # the size to return to
        self._direction = STEP
        self._rest, self._next_rest = FIRST_REST, FIRST_REST
        self._epoch = _Epoch()

    @property
    def is_on_trial(self) -> bool:
        """Whether another size than the one in use is being tried."""
        return self._trial_of is not None

    def begin(self, distance: float) -> None:
        """The first answer is there, and the farthest of its servers so many seconds away; said again, it counts no
        more."""
        if not self._has_begun:
            self._has_begun = True
            self.bytes = NEAR_START if 0 < distance <= NEAR else START

    def came_back(self, size: int, positions: int, now: float) -> None:
        """A micro-batch of `size` bytes' worth at the time it was made, with so many positions, is back."""
        if size != self.bytes:
            return  # made before the size changed
        epoch = self._epoch
        if epoch.since is None:
            epoch.since = now  # what came before it was another size's
            return
        epoch.positions += positions
        epoch.micro_batches += 1
        if epoch.micro_batches >= EPOCH_MICRO_BATCHES and now - epoch.since >= EPOCH_SECONDS:
            self._judge(epoch.positions / (now - epoch.since))

    def pause(self) -> None:
        """Nothing is in flight any more: what comes next is another stream's."""
        self._epoch = _Epoch()

    def _judge(self, rate: float) -> None:
        self._epoch = _Epoch()
        if self._trial_of is None:
            self._best_rate = rate
            self._rest -= 1
            if self._rest <= 0:
                self._try(self._direction)
        elif self._best_rate is not None and rate > BETTER * self._best_rate:
            self._best_rate, self._trial_of, self._rest, self._next_rest = rate, None, 0, FIRST_REST
        else:
            self.bytes, self._trial_of = self._trial_of, None
            self._direction = 1 / self._direction
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)

    def _try(self, factor: float) -> None:
        other = min(LARGEST, max(SMALLEST, round(self.bytes * factor)))
        if other == self.bytes:
            self._direction = 1 / self._direction
        else:
            self._trial_of, self.bytes = self.bytes, other
