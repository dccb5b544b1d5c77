"""The size of micro-batches, and what trials find out of pushing, over servers with simulated rates."""

import random

import pytest
import torch

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.scheduling.push_choice import PushChoice, PushPolicy
from petals_eval.swarm.scheduling.tuning import Delivery, MicroBatchSize, SizePolicy, Tuning
from petals_eval.swarm.wire.messages import MAX_PUSH_BYTES
from tests.support.fake_swarm import settings

FAR, NEAR = 2 * SizePolicy.near_rtt, SizePolicy.near_rtt / 2


def settle(bytes_per_second: float, rtt: float = FAR) -> int:
    """Return the size after some micro-batches from servers that deliver so much."""
    size = MicroBatchSize()
    for _ in range(40):
        size.on_delivered(bytes_per_second, rtt)
    return size.bytes


def test_a_micro_batch_takes_the_slowest_server_some_hundredths_of_a_second():
    rate = 2e6
    assert settle(rate) == pytest.approx(SizePolicy.service_seconds * rate, rel=0.01)


@pytest.mark.parametrize(
    ("bytes_per_second", "rtt", "size"),
    [
        (1e3, FAR, SizePolicy.smallest),
        (1e9, FAR, SizePolicy.largest),
        (1e9, 0.0, SizePolicy.largest),
        (1e9, NEAR, SizePolicy.near_largest),
    ],
)
def test_the_bounds_hold(bytes_per_second, rtt, size):
    """A message above the stream window costs a round trip more: nothing, where that takes no time."""
    assert settle(bytes_per_second, rtt) == pytest.approx(size, rel=0.01)


def test_one_answer_that_is_late_changes_little():
    size = MicroBatchSize()
    for _ in range(40):
        size.on_delivered(2e6, FAR)
    before = size.bytes
    size.on_delivered(1e5, FAR)
    assert size.bytes > 0.7 * before


# -- pushing

TOKENS = 60


class Simulated:
    """Micro-batches of 60 tokens come back one after the other, at so many tokens a second either way."""

    def __init__(self, choice: PushChoice, ordinary: float, pushed: float, noise: float = 0.0):
        self.choice = choice
        self.rates = {False: ordinary, True: pushed}
        self.noise = noise
        self.now = 0.0
        self.seconds = {False: 0.0, True: 0.0}
        self.sent = {False: 0, True: 0}
        self._draw = random.Random(0)

    def run(self, seconds: float) -> "Simulated":
        end = self.now + seconds
        while self.now < end:
            pushed = self.choice.on_sent()
            took = TOKENS / self.rates[pushed] * (1 + self.noise * (self._draw.random() - 0.5))
            self.now += took
            self.seconds[pushed] += took
            self.sent[pushed] += 1
            self.choice.on_ended(pushed)
            self.choice.on_delivered(pushed, TOKENS, self.now)
        return self


@pytest.mark.parametrize(("setting", "expected"), [("always", True), ("never", False)])
def test_what_is_set_stays(setting, expected):
    choice = PushChoice(setting)
    run = Simulated(choice, 600, 600).run(200)
    choice.on_failed()
    assert choice.is_on is expected and not choice.is_on_trial
    assert run.sent[not expected] == 0


@pytest.mark.parametrize("pushed", [60, 600, 6000])
def test_a_run_of_a_few_epochs_sees_no_trial(pushed):
    run = Simulated(PushChoice(), 600, pushed).run(PushPolicy.first_rest * PushPolicy.epoch_seconds)
    assert run.sent[True] == 0


def test_what_brings_three_times_as_much_is_found_and_kept():
    run = Simulated(PushChoice(), 600, 1800).run(20)
    assert run.choice.is_on and not run.choice.is_on_trial
    run.run(600)
    assert run.seconds[True] > 0.9 * (run.seconds[True] + run.seconds[False])


@pytest.mark.parametrize("pushed", [60, 300, 600, 650])
def test_what_brings_no_more_is_left_and_costs_little(pushed):
    run = Simulated(PushChoice(), 600, pushed, noise=0.3).run(600)
    assert not run.choice.is_on or run.choice.is_on_trial
    assert run.seconds[True] < 0.15 * run.now
    assert run.seconds[True] > 0  # it was tried


def test_it_changes_again_when_the_network_does():
    run = Simulated(PushChoice(), 600, 1800).run(30)
    assert run.choice.is_on
    run.rates[True] = 200
    run.run(120)
    assert not run.choice.is_on or run.choice.is_on_trial
    assert run.seconds[False] > 60


def test_a_failure_ends_it_and_each_makes_the_rest_longer():
    choice = PushChoice()
    run = Simulated(choice, 600, 1800)
    trials = []
    for _ in range(3):
        before = run.now
        while not choice.is_on:
            run.run(0.05)
        trials.append(run.now - before)
        choice.on_failed()
        assert not choice.is_on and not choice.is_on_trial
    assert trials[0] < trials[1] < trials[2]


def test_a_trial_that_brings_next_to_nothing_ends_all_the_same():
    run = Simulated(PushChoice(), 600, 6).run(300)
    assert not run.choice.is_on
    assert run.seconds[True] < 120


def test_what_was_sent_before_a_change_does_not_count():
    choice = PushChoice()
    run = Simulated(choice, 600, 1800)
    while not choice.is_on:
        run.run(0.05)
    for _ in range(1000):  # of the ordinary way, late
        run.now += 0.1
        choice.on_delivered(False, TOKENS, run.now)
    assert choice.is_on_trial


def test_a_trial_waits_for_those_that_still_go_the_ordinary_way():
    """They take the uplink from it: pushing three times as fast would look no faster."""
    choice = PushChoice()
    run = Simulated(choice, 600, 1800)
    lingering = [choice.on_sent() for _ in range(20)]
    while not choice.is_on:
        run.run(0.05)
    run.rates[True] = 600
    run.run(5.0)
    assert choice.is_on_trial
    for pushed in lingering:
        choice.on_ended(pushed)
    run.rates[True] = 1800
    run.run(5.0)
    assert choice.is_on and not choice.is_on_trial


# -- which way

PUSH, SAME = "2.3.0.dev2", "2.2.0.post1"  # a version that pushes on what it was pushed, and one that does not


class Clock:
    def __init__(self):
        self.now = 0.0


@pytest.fixture
def clock():
    return Clock()


def tuning(clock=None, **values) -> Tuning:
    return Tuning(settings(**values), Runtime(monotonic=lambda: clock.now if clock else 0.0))


def send(tuning: Tuning, clock: Clock, seconds: float, until, most: int = 10_000) -> int:
    """Send one micro-batch after the other through two servers until a condition holds; return how many it took."""
    for count in range(most):
        if until():
            return count
        delivery = tuning.choose(Activations(torch.zeros(1, 60, 4)))
        clock.now += seconds
        tuning.release(delivery)
        tuning.record(delivery, [PUSH, PUSH], 60, PushPolicy.min_stretch)
    return most


@pytest.mark.parametrize(
    ("activations", "values"),
    [
        (Activations(torch.zeros(1, 3, 4), prompts=torch.zeros(2, 1, 1, 4)), {}),
        (Activations(torch.zeros(1, 3, 4)), {"wire": "float16"}),
        (Activations(torch.zeros(1, 1, MAX_PUSH_BYTES // 4 + 1)), {}),
    ],
    ids=["deep prompts", "a lossy wire", "too large"],
)
def test_what_cannot_be_pushed_goes_hop_by_hop_whatever_is_set(activations, values):
    assert tuning(push="always", **values).choose(activations) is Delivery.HOP_BY_HOP_ONLY


def test_what_can_be_pushed_goes_the_way_in_use():
    small = Activations(torch.zeros(1, 3, 4))
    assert tuning(push="always").choose(small) is Delivery.PUSHED
    assert tuning(push="never").choose(small) is Delivery.HOP_BY_HOP_ONLY
    assert tuning().choose(small) is Delivery.HOP_BY_HOP


def test_where_one_server_answers_as_soon_as_it_can_pushing_is_not_tried(clock):
    """Then the uplink is not what everything waits for, and a trial would only take time from the run."""
    both = tuning(clock)
    for _ in range(10_000):
        delivery = both.choose(Activations(torch.zeros(1, 60, 4)))
        clock.now += 0.05
        both.release(delivery)
        both.record(delivery, [PUSH, PUSH], 60, 1.5)
        assert not both.push.is_on


@pytest.mark.parametrize("versions", [[PUSH], [PUSH, SAME], [PUSH, None]])
def test_routes_that_cannot_push_are_compared_with_none_that_can(clock, versions):
    both = tuning(clock)
    for _ in range(10_000):
        delivery = both.choose(Activations(torch.zeros(1, 60, 4)))
        clock.now += 0.05
        both.release(delivery)
        both.record(delivery, versions, 60, PushPolicy.min_stretch)
    assert not both.push.is_on and not both.push.is_on_trial


def test_a_pause_ends_what_is_being_measured(clock):
    both = tuning(clock)
    send(both, clock, 0.05, lambda: clock.now > 2.5)
    both.push.pause()
    clock.now += 3600  # until the next stream
    sent = send(both, clock, 0.05, lambda: both.push.is_on_trial)
    assert sent * 0.05 >= PushPolicy.first_rest * PushPolicy.epoch_seconds, "as long as if nothing had been measured"
