"""What trials find out: the size of micro-batches and whether to push, over servers with simulated rates."""

import random

import pytest
import torch

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.scheduling.tuning import Delivery, MicroBatchSize, PushChoice, PushPolicy, SizePolicy, Tuning
from petals_eval.swarm.wire.messages import MAX_PUSH_BYTES
from tests.support.fake_swarm import settings

BYTES_PER_TOKEN = 256


def settle(seconds_of, micro_batches: int = 20_000, noise: float = 0.0) -> MicroBatchSize:
    """seconds_of: of a micro-batch of so many tokens."""
    size, now, draw = MicroBatchSize(), 0.0, random.Random(0)
    for _ in range(micro_batches):
        made_for = size.bytes
        tokens = made_for // BYTES_PER_TOKEN
        now += seconds_of(tokens) * (1 + noise * (draw.random() - 0.5))
        size.on_delivered(made_for, tokens, now)
    return size


def test_where_calls_cost_much_and_tokens_little_it_grows():
    size = settle(lambda tokens: 0.1 + 1e-5 * tokens)
    assert not size.is_on_trial or size._return_to == SizePolicy.largest
    assert max(settle(lambda tokens: 0.1 + 1e-5 * tokens, n).bytes for n in (19_000, 19_500)) == SizePolicy.largest


def test_where_large_messages_are_slow_it_shrinks():
    size = settle(lambda tokens: 0.01 + 1e-7 * tokens**2)
    best = (0.01 / 1e-7) ** 0.5 * BYTES_PER_TOKEN
    assert SizePolicy.smallest <= size.bytes <= 2 * best


def test_where_it_makes_no_difference_it_stays_despite_noise():
    times_at_start = sum(
        settle(lambda tokens: 1e-4 * tokens, n, noise=0.5).bytes == SizePolicy.start for n in range(2000, 4000, 100)
    )
    assert times_at_start > 15


@pytest.mark.parametrize("seconds_of", [lambda n: 1e-4 * n, lambda n: 0.1, lambda n: 1e-8 * n**3])
def test_the_bounds_hold(seconds_of):
    for count in range(0, 5000, 250):
        assert SizePolicy.smallest <= settle(seconds_of, count).bytes <= SizePolicy.largest


def test_a_run_of_some_seconds_tries_no_other_size():
    """Seen with real servers: a size above libp2p's window, tried after three seconds, took a third of the pace for six
    of sixteen."""
    assert not any(settle(lambda tokens: 0.05, n).is_on_trial for n in range(0, 240, 10))  # 12 seconds
    assert settle(lambda tokens: 0.05, 280).is_on_trial


def test_what_was_made_before_a_change_is_not_counted():
    size = MicroBatchSize()
    for second in range(100):
        size.on_delivered(SizePolicy.start - 1, 1000, float(second))
    assert size.bytes == SizePolicy.start


@pytest.mark.parametrize(
    ("rtt", "start"),
    [
        (SizePolicy.near_rtt / 2, SizePolicy.near_start),
        (2 * SizePolicy.near_rtt, SizePolicy.start),
        (0.0, SizePolicy.start),
    ],
)
def test_near_servers_are_sent_more_at_once_from_the_start(rtt, start):
    """A message above the stream window costs a round trip more: nothing, where that takes no time."""
    size = MicroBatchSize()
    size.begin(rtt)
    size.begin(0.5)  # the route of another micro-batch
    size.begin(0.001)
    assert size.bytes == start <= SizePolicy.largest


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


# -- both together

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
        delivery, made_for = tuning.choose(Activations(torch.zeros(1, 60, 4))), tuning.size.bytes
        clock.now += seconds
        tuning.release(delivery)
        tuning.record(delivery, [PUSH, PUSH], 60, 0.5)
        tuning.record_size(made_for, 60)
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
    assert tuning(push="never").choose(small) is tuning().choose(small) is Delivery.HOP_BY_HOP


def test_one_trial_is_made_at_a_time(clock):
    both, trials = tuning(clock), set()

    def look():
        trials.add((both.size.is_on_trial, both.push.is_on_trial))
        return clock.now > 600

    send(both, clock, 0.05, look, most=20_000)
    assert trials == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("versions", [[PUSH], [PUSH, SAME], [PUSH, None]])
def test_routes_that_cannot_push_are_compared_with_none_that_can(clock, versions):
    both = tuning(clock)
    for _ in range(10_000):
        delivery = both.choose(Activations(torch.zeros(1, 60, 4)))
        clock.now += 0.05
        both.release(delivery)
        both.record(delivery, versions, 60, 0.5)
    assert not both.push.is_on and not both.push.is_on_trial


def test_a_pause_ends_what_is_being_measured(clock):
    both = tuning(clock)
    send(both, clock, 0.05, lambda: clock.now > 2.5)
    both.pause()
    clock.now += 3600  # until the next stream
    sent = send(both, clock, 0.05, lambda: both.push.is_on_trial)
    assert sent * 0.05 >= PushPolicy.first_rest * PushPolicy.epoch_seconds, "as long as if nothing had been measured"
