"""Whether servers should push micro-batches along a whole route, which is tried out. No I/O.

Pushing saves the client's uplink: every hidden state leaves home once and not once a hop. It costs sessions, one a hop
and micro-batch, and room in the servers' caches. So it pays where the uplink is what everything waits for, which no
single server's answers show. Hence trials: the other way is tried for an epoch now and then, and kept where it brings
clearly more. A trial costs much where pushing cannot pay, so the uplink must be under suspicion first: calls to every
server of the route are held up. A busy link or server of its own delays its own calls only.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal

__all__ = ["PushChoice", "PushPolicy"]

_log = logging.getLogger(__name__)


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
