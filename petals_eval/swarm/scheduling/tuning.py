"""What is found out on the way by trials: how large a micro-batch should be, and whether servers should push. No I/O.

Size. Each call costs something whatever it carries, on the server (4 ms of a processor were measured on a real one) and
at home, so larger is better. But a message above libp2p's stream window waits for the other side's leave to send the
rest: one more round trip, behind all that is on its way back. Measured with a bare echo over 100 Mbit/s and 20 ms each
way: messages of 128 to 240 KiB fill 96% of the link, those of 256 KiB 46%, however many are in flight. So micro-batches
start just below the window, or at twice that where all servers are near and a round trip costs nothing (an eighth less
time without an emulated network); another size is kept only where it brings more.

Pushing saves the client's uplink: every hidden state leaves home once and not once a hop. It costs sessions, one a hop
and micro-batch, and room in the servers' caches. So it pays where the uplink is what everything waits for, which no
single server's answers show. Hence trials here, too: the other way is tried for an epoch now and then, and kept where
it brings clearly more.
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
    """How sizes are tried. Sizes are bytes, rests are epochs.

    start: libp2p's window of 256 KiB, less what a message has beside its tensor (a few deep prompts among it).
    near_rtt, near_start: seconds that a small question takes to the farthest server, and where sizes start when it is
        no more.
    smallest, largest: below, calls cost more than what they carry; above, Petals' servers want the streaming call.
    step: times the size in use, or one over it, that is tried.
    better: times as fast another size must be: the pace of shared machines and links is no steadier than that.
    epoch_seconds, epoch_micro_batches: that one size is measured over.
    first_rest, longest_rest: before a trial: what short runs never come to, for a size above libp2p's window may cost a
        third of the pace while it is tried. As many again after a trial that brought nothing, then twice as many each
        time.
    """

    start: int = 240 << 10
    near_rtt: float = 0.05
    near_start: int = 480 << 10
    smallest: int = 64 << 10
    largest: int = 1 << 20
    step: float = 1.5
    better: float = 1.15
    epoch_seconds: float = 3.0
    epoch_micro_batches: int = 32
    first_rest: int = 4
    longest_rest: int = 64


@dataclass(slots=True)
class _Epoch:
    """What has come back at one size."""

    since: float | None = None
    tokens: int = 0
    micro_batches: int = 0


class MicroBatchSize:
    """Climbs to the size in bytes that brings most tokens per second.

    is_on_trial: whether another size than the one in use is being tried.
    """

    def __init__(self, policy: SizePolicy = SizePolicy()) -> None:
        self._policy = policy
        self.bytes = policy.start
        self.is_on_trial = False
        self._has_begun = False
        self._best_rate: float | None = None  # at the size in use, unless a trial is on
        self._return_to = policy.start  # the size to return to after a trial
        self._direction = policy.step
        self._rest, self._next_rest = policy.first_rest, policy.first_rest
        self._epoch = _Epoch()

    def begin(self, rtt: float) -> None:
        """Choose where to start, once the first answer is there. rtt: seconds to the farthest of its servers."""
        if not self._has_begun:
            self._has_begun = True
            self.bytes = self._policy.near_start if 0 < rtt <= self._policy.near_rtt else self._policy.start

    def on_delivered(self, size: int, tokens: int, now: float) -> None:
        """Count a micro-batch that is back, and was made when this was the size."""
        if size != self.bytes:
            return  # made before the size changed
        epoch = self._epoch
        if epoch.since is None:
            epoch.since = now  # what came before it was another size's
            return
        epoch.tokens += tokens
        epoch.micro_batches += 1
        policy = self._policy
        if epoch.micro_batches >= policy.epoch_micro_batches and now - epoch.since >= policy.epoch_seconds:
            self._judge(epoch.tokens / (now - epoch.since))

    def pause(self) -> None:
        """Begin to measure anew: nothing is in flight any more, and what comes next is another stream's."""
        self._epoch = _Epoch()

    def _judge(self, rate: float) -> None:
        self._epoch, policy = _Epoch(), self._policy
        if not self.is_on_trial:
            self._best_rate = rate
            self._rest -= 1
            if self._rest <= 0:
                self._try(self._direction)
        elif self._best_rate is not None and rate > policy.better * self._best_rate:
            _log.debug(
                "micro-batches of %d KiB bring %.2f times as much: kept", self.bytes >> 10, rate / self._best_rate
            )
            self._best_rate, self.is_on_trial, self._rest, self._next_rest = rate, False, 0, policy.first_rest
        else:
            _log.debug("micro-batches of %d KiB bring no more than before", self.bytes >> 10)
            self.bytes, self.is_on_trial = self._return_to, False
            self._direction = 1 / self._direction
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, policy.longest_rest)

    def _try(self, factor: float) -> None:
        other = min(self._policy.largest, max(self._policy.smallest, round(self.bytes * factor)))
        if other == self.bytes:
            self._direction = 1 / self._direction
        else:
            self._return_to, self.bytes, self.is_on_trial = self.bytes, other, True
            _log.debug("micro-batches of %d KiB are tried, in place of %d KiB", other >> 10, self._return_to >> 10)


@dataclass(frozen=True)
class PushPolicy:
    """How pushing is tried. Rests are epochs.

    better: times as fast the other way must be. epoch_seconds, epoch_micro_batches: that one way is measured over.
    longest_epoch: seconds after which a trial is judged however few have come back, and that it waits at most for those
        that were on their way when it began: these still take the uplink from it.
    first_rest, longest_rest: before a trial: what short runs never come to. Twice as many after each trial that brought
        nothing.
    """

    better: float = 1.15
    epoch_seconds: float = 3.0
    epoch_micro_batches: int = 10
    longest_epoch: float = 10.0
    first_rest: int = 3
    longest_rest: int = 64


class PushChoice:
    """Whether to push now (`is_on`), and whether that is only being tried (`is_on_trial`)."""

    def __init__(
        self,
        setting: Literal["auto", "always", "never"] = "auto",
        policy: PushPolicy = PushPolicy(),
    ):
        self.is_on = setting == "always"
        self.is_on_trial = False
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
            if self._rest <= 0:
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
    """Both trials, one at a time: what one brings is measured while the other stays as it is."""

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

    def record(self, delivery: Delivery, versions: Sequence[str | None], tokens: int, rtt: float) -> None:
        """Count a micro-batch that is back; only routes on which every server can push are comparable.

        versions: of the servers of its route, as they say. rtt: seconds to the farthest of them.
        """
        self.size.begin(rtt)
        is_comparable = delivery is not Delivery.HOP_BY_HOP_ONLY and len(versions) > 1
        if not is_comparable or self.size.is_on_trial or not all(map(may_push, versions)):
            return
        was_on = self.push.is_on
        self.push.on_delivered(delivery is Delivery.PUSHED, tokens, self._runtime.monotonic())
        if self.push.is_on != was_on:
            self.size.pause()

    def record_size(self, made_for: int, tokens: int) -> None:
        """Count a micro-batch that was made for this size and is back."""
        if not self.push.is_on_trial:
            self.size.on_delivered(made_for, tokens, self._runtime.monotonic())

    def pause(self) -> None:
        """Begin to measure anew: nothing is in flight any more, and what comes next is another stream's."""
        self.size.pause()
        self.push.pause()
