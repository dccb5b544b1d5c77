"""The size of micro-batches: simulated servers, and the size it climbs to."""

import random

import pytest

from petals_eval.swarm.scheduling.tuning import LARGEST, NEAR, NEAR_START, SMALLEST, START, MicroBatchSize

BYTES_PER_POSITION = 256


def settle(seconds_of, micro_batches: int = 20_000, noise: float = 0.0) -> MicroBatchSize:
    """seconds_of: of a micro-batch of so many positions."""
    size, now, draw = MicroBatchSize(), 0.0, random.Random(0)
    for _ in range(micro_batches):
        made_for = size.bytes
        positions = made_for // BYTES_PER_POSITION
        now += seconds_of(positions) * (1 + noise * (draw.random() - 0.5))
        size.came_back(made_for, positions, now)
    return size


def test_where_calls_cost_much_and_tokens_little_it_grows():
    assert settle(lambda positions: 0.1 + 1e-5 * positions)._trial_of in (None, LARGEST)
    assert max(settle(lambda positions: 0.1 + 1e-5 * positions, n).bytes for n in (19_000, 19_500)) == LARGEST


def test_where_large_messages_are_slow_it_shrinks():
    size = settle(lambda positions: 0.01 + 1e-7 * positions**2)
    best = (0.01 / 1e-7) ** 0.5 * BYTES_PER_POSITION
    assert SMALLEST <= size.bytes <= 2 * best


def test_where_it_makes_no_difference_it_stays_despite_noise():
    times_at_start = sum(
        settle(lambda positions: 1e-4 * positions, n, noise=0.5).bytes == START for n in range(2000, 4000, 100)
    )
    assert times_at_start > 15


@pytest.mark.parametrize("seconds_of", [lambda n: 1e-4 * n, lambda n: 0.1, lambda n: 1e-8 * n**3])
def test_the_bounds_hold(seconds_of):
    for count in range(0, 5000, 250):
        assert SMALLEST <= settle(seconds_of, count).bytes <= LARGEST


def test_a_run_of_some_seconds_tries_no_other_size():
    """Seen with real servers: a size above libp2p's window, tried after three seconds, took a third of the pace for six
    of sixteen."""
    assert not any(settle(lambda positions: 0.05, n).is_on_trial for n in range(0, 240, 10))  # 12 seconds
    assert settle(lambda positions: 0.05, 280).is_on_trial


def test_what_was_made_before_a_change_is_not_counted():
    size = MicroBatchSize()
    for second in range(100):
        size.came_back(START - 1, 1000, float(second))
    assert size.bytes == START


@pytest.mark.parametrize(("distance", "start"), [(NEAR / 2, NEAR_START), (2 * NEAR, START), (0.0, START)])
def test_near_servers_are_sent_more_at_once_from_the_start(distance, start):
    """A message above the stream window costs a round trip more: nothing, where that takes no time."""
    size = MicroBatchSize()
    size.begin(distance)
    size.begin(0.5)  # the route of another micro-batch
    size.begin(0.001)
    assert size.bytes == start <= LARGEST
