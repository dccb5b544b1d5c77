"""How large a micro-batch should be, which is reckoned, and whether servers should push, which is tried out. No I/O.

Size. Each call costs something whatever it carries, on the server (4 ms of a processor were measured on a real one) and
at home, so larger is better. But each server, and each link, has the whole of a micro-batch before the next one gets
any of it: the larger they are, the longer it takes until every server has work, and until the last ones are through.
So they are as large as the slowest server of a route delivers in some hundredths of a second, its link included. And a
message above libp2p's stream window waits for the other side's leave to send the rest: one more round trip, behind all
that is on its way back. Measured with a bare echo over 100 Mbit/s and 20 ms each way: messages of 128 to 240 KiB fill
96% of the link, those of 256 KiB 46%, however many are in flight. So the window is the most, or twice that where all
servers are near and a round trip costs nothing (an eighth less time without an emulated network).

Pushing saves the client's uplink: every hidden state leaves home once and not once a hop. It costs sessions, one a hop
and micro-batch, and room in the servers' caches. So it pays where the uplink is what everything waits for, which no
single server's answers show. Hence trials: the other way is tried for an epoch now and then, and kept where it brings
clearly more. A trial costs much where pushing cannot pay, so the uplink must be under suspicion first: calls to every
server of the route are held up. A busy link or server of its own delays its own calls only.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from petals_eval.config import SwarmSettings
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.messages import MAX_PUSH_BYTES
from petals_eval.swarm.wire.server_info import may_push

__all__ = ["Delivery", "MicroBatchSize", "PushChoice", "PushPolicy", "SizePolicy", "Tuning"]

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class PushPolicy:
    """How pushing is tried. Rests are epochs.

    better: times as fast the other way must be. epoch_seconds, epoch_micro_batches: that one way is measured over.
    longest_epoch: seconds after which a trial is judged however few have come back, and that it waits at most for those
        that were on their way when it began: these still take the uplink from it.
    first_rest, longest_rest: before a trial: what short runs never come to. Twice as many after each trial that brought
        nothing.
    min_stretch: `CongestionWindow.stretch` of every server of the route before pushing is tried. Where all hops share
        an uplink that they fill the least of them has 2.6 to 10 (simulated), where each has its own link at most 2.2.
    """

    better: float = 1.15
    epoch_seconds: float = 3.0
    min_stretch: float = 2.5
    epoch_micro_batches: int = 10
    longest_epoch: float = 10.0
    first_rest: int = 3
    longest_rest: int = 64


class PushChoice:
    """Whether to push now (`is_on`), and whether that is only being tried (`is_on_trial`).

    may_pay: whether pushing is worth a trial.
    """

    def __init__(
        self,
        setting: Literal["auto", "always", "never"] = "auto",
        policy: PushPolicy = PushPolicy(),
    ):
        self.is_on = setting == "always"
        self.is_on_trial = False
        self.may_pay = True
        self._policy = policy
        self._is_fixed = setting != "auto"
        self._rate = 0.0  # tokens per second of the way in use
        self._rest, self._next_rest = policy.first_rest, 2 * policy.first_rest
        self._since: float | None = None
        self._changed_at: float | None = None
        self._tokens = self._micro_batches = 0
        self._in_flight: Counter[bool] = Counter()  # by whether they were to be pushed

    def on_sent(self) -> bool:
        """Count a micro-batch that could go either way, and return whether to push it; `on_ended` when it is on no
        way any more."""
        self._in_flight[self.is_on] += 1
        return self.is_on

    def on_ended(self, pushed: bool) -> None:
        """Count a micro-batch as on no way any more."""
        self._in_flight[pushed] -= 1

    def on_delivered(self, pushed: bool, tokens: int, now: float) -> None:
        """Count a micro-batch that is back, on a route that could have gone either way.

        pushed: whether it was to be pushed, even where that failed.
        """
        policy = self._policy
        if self._is_fixed or pushed != self.is_on:
            return  # sent before the change
        if self._since is None:
            self._changed_at = now if self._changed_at is None else self._changed_at
            if not self._in_flight[not pushed] or now - self._changed_at >= policy.longest_epoch:
                self._since = now  # what came before it was not of this way alone
            return
        self._tokens += tokens
        self._micro_batches += 1
        took = now - self._since
        is_over = took >= policy.epoch_seconds and self._micro_batches >= policy.epoch_micro_batches
        if is_over or (self.is_on_trial and took >= policy.longest_epoch):
            self._judge(self._tokens / took)

    def on_failed(self) -> None:
        """Push no more for a while, and longer each time: the route did not do it."""
        if not self._is_fixed and self.is_on:
            self._go(False, self._next_rest)

    def pause(self) -> None:
        """Begin to measure anew: what comes back from now on is not to be compared with what came before."""
        self._since = self._changed_at = None
        self._tokens = self._micro_batches = 0

    def _judge(self, rate: float) -> None:
        policy = self._policy
        if not self.is_on_trial:
            self._rate = rate
            self._rest -= 1
            self.pause()
            if self._rest <= 0 and (self.is_on or self.may_pay):
                self.is_on, self.is_on_trial = not self.is_on, True
                _log.debug("%s is tried", "pushing" if self.is_on else "sending hop by hop")
        elif rate > policy.better * self._rate:
            self._rate, self._next_rest = rate, 2 * policy.first_rest
            self._go(self.is_on, self._next_rest)
        else:
            self._go(not self.is_on, self._next_rest)

    def _go(self, on: bool, rest: int) -> None:
        """Go this way from now on, without a trial for `rest` epochs."""
        _log.debug("micro-batches are %s from now on", "pushed" if on else "sent hop by hop")
        self.is_on, self.is_on_trial = on, False
        self._rest, self._next_rest = rest, min(2 * rest, self._policy.longest_rest)
        self.pause()


class Delivery(Enum):
    """Which way a micro-batch goes. `HOP_BY_HOP_ONLY`: it could not be pushed, and is compared with none that could."""

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
            activations.prompts is None  # servers push no step that carries deep prompts
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
