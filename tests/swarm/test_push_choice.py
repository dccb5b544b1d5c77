"""Whether to push: simulated rates, and what is chosen."""

import random

import pytest
from petals_eval.swarm.scheduling.push_choice import EPOCH_SECONDS, FIRST_REST, PushChoice

POSITIONS = 60


class Simulated:
    """Micro-batches of 60 positions come back one after the other, at so many positions a second either way."""

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
            pushed = self.choice.sent()
            took = POSITIONS / self.rates[pushed] * (1 + self.noise * (self._draw.random() - 0.5))
            self.now += took
            self.seconds[pushed] += took
            self.sent[pushed] += 1
            self.choice.ended(pushed)
            self.choice.came_back(pushed, POSITIONS, self.now)
        return self


@pytest.mark.parametrize(("setting", "expected"), [("always", True), ("never", False)])
def test_what_is_set_stays(setting, expected):
    choice = PushChoice(setting)
    run = Simulated(choice, 600, 600).run(200)
    choice.failed()
    assert choice.is_on is expected and not choice.is_on_trial
    assert run.sent[not expected] == 0


@pytest.mark.parametrize("pushed", [60, 600, 6000])
def test_a_run_of_a_few_epochs_sees_no_trial(pushed):
    run = Simulated(PushChoice(), 600, pushed).run(FIRST_REST * EPOCH_SECONDS)
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
        choice.failed()
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
        choice.came_back(False, POSITIONS, run.now)
    assert choice.is_on_trial


def test_a_trial_waits_for_those_that_still_go_the_ordinary_way():
    """They take the uplink from it: pushing three times as fast would look no faster."""
    choice = PushChoice()
    run = Simulated(choice, 600, 1800)
    lingering = [choice.sent() for _ in range(20)]
    while not choice.is_on:
        run.run(0.05)
    run.rates[True] = 600
    run.run(5.0)
    assert choice.is_on_trial
    for pushed in lingering:
        choice.ended(pushed)
    run.rates[True] = 1800
    run.run(5.0)
    assert choice.is_on and not choice.is_on_trial
