"""How large a micro-batch should be, and what those that are back tell of that, and of pushing. No I/O.

Size. Each call costs something whatever it carries, on the server (4 ms of a processor were measured on a real one) and
at home, so larger is better. But each server, and each link, has the whole of a micro-batch before the next one gets
any of it: the larger they are, the longer it takes until every server has work, and until the last ones are through.
So they are as large as the slowest server of a route delivers in some hundredths of a second, its link included. And a
message above libp2p's stream window waits for the other side's leave to send the rest: one more round trip, behind all
that is on its way back. Measured with a bare echo over 100 Mbit/s and 20 ms each way: messages of 128 to 240 KiB fill
96% of the link, those of 256 KiB 46%, however many are in flight. So the window is the most, or twice that where all
servers are near and a round trip costs nothing (an eighth less time without an emulated network).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from petals_eval.config import SwarmSettings
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.scheduling.push_choice import PushChoice, PushPolicy
from petals_eval.swarm.wire.messages import MAX_PUSH_BYTES
from petals_eval.swarm.wire.server_info import may_push

__all__ = ["Delivery", "MicroBatchSize", "SizePolicy", "Tuning"]


@dataclass(frozen=True)
class SizePolicy:
    """What decides the size of micro-batches. Sizes are bytes.

    start: before anything was measured.
    service_seconds: of the slowest server of a route for one of them.
    smallest, largest: below, calls cost more than what they carry; above is libp2p's window of 256 KiB, less what a
        message has beside its tensor (a few deep prompts among it).
    near_rtt, near_largest: seconds that a small question takes to the farthest server, and the largest size where it is
        no more.
    smoothing: of the difference to what one micro-batch tells is made up for at once.
    """

    start: int = 96 << 10
    service_seconds: float = 0.06
    smallest: int = 16 << 10
    largest: int = 240 << 10
    near_rtt: float = 0.05
    near_largest: int = 480 << 10
    smoothing: float = 0.25


class MicroBatchSize:
    """Follows what the servers deliver.

    bytes: of hidden states that are best sent at once.
    """

    def __init__(self) -> None:
        self.bytes = SizePolicy.start

    def on_delivered(self, bytes_per_second: float, rtt: float) -> None:
        """Take in a micro-batch that is back.

        bytes_per_second: that the slowest server of its route delivers. rtt: seconds to the farthest of them.
        """
        policy = SizePolicy
        largest = policy.near_largest if 0 < rtt <= policy.near_rtt else policy.largest
        wanted = min(largest, max(policy.smallest, policy.service_seconds * bytes_per_second))
        self.bytes += round(policy.smoothing * (wanted - self.bytes))


class Delivery(Enum):
    """Which way a micro-batch goes.

    `HOP_BY_HOP_ONLY`: it cannot be pushed, or is not to be, and is compared with none that may be.
    """

    PUSHED = "pushed"
    HOP_BY_HOP = "hop by hop"
    HOP_BY_HOP_ONLY = "hop by hop only"


class Tuning:
    """What micro-batches tell of size and way when they are back."""

    def __init__(self, settings: SwarmSettings, runtime: Runtime):
        self.size = MicroBatchSize()
        self.push = PushChoice(settings.push)
        self._settings = settings
        self._runtime = runtime

    def choose(self, activations: Activations) -> Delivery:
        """Count a micro-batch on its way and return which way that is to be. Give it to `release`, whatever comes."""
        can_be_pushed = (
            self._settings.push != "never"
            and activations.prompts is None  # servers push no step that carries deep prompts
            and self._settings.wire is None
            and 4 * activations.values <= MAX_PUSH_BYTES
        )
        if not can_be_pushed:
            return Delivery.HOP_BY_HOP_ONLY
        return Delivery.PUSHED if self.push.on_sent() else Delivery.HOP_BY_HOP

    def release(self, delivery: Delivery) -> None:
        """Count a micro-batch as on no way any more."""
        if delivery is not Delivery.HOP_BY_HOP_ONLY:
            self.push.on_ended(delivery is Delivery.PUSHED)

    def record(self, delivery: Delivery, versions: Sequence[str | None], tokens: int, stretch: float) -> None:
        """Count a micro-batch that is back; only routes on which every server can push are comparable.

        versions: of the servers of its route, as they say. stretch: the least of them (`CongestionWindow.stretch`).
        """
        if delivery is not Delivery.HOP_BY_HOP_ONLY and len(versions) > 1 and all(map(may_push, versions)):
            self.push.may_pay = stretch >= PushPolicy.min_stretch
            self.push.on_delivered(delivery is Delivery.PUSHED, tokens, self._runtime.monotonic())
