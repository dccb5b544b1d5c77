"""A server's window: simulated servers with a delay and a rate, and what the window makes of them."""

import heapq

import pytest

from petals_eval.swarm.peers.window import CongestionWindow, WindowPolicy

MIN_CALLS, MAX_TOKENS = WindowPolicy.min_calls, WindowPolicy.max_tokens


class Simulated:
    """A server that computes one call after the other, at `rate` work per second, `delay` seconds away in all."""

    def __init__(self, rate: float, delay: float):
        self.rate, self.delay = rate, delay
        self.free_at = 0.0

    def answer_at(self, work: float, now: float) -> float:
        self.free_at = max(self.free_at, now + self.delay / 2) + work / self.rate
        return self.free_at + self.delay / 2


def window_to(server: Simulated) -> CongestionWindow:
    """As it is after a small question was asked."""
    window = CongestionWindow()
    window.observe_rtt(server.delay)
    return window


def drive(
    window: CongestionWindow, server: Simulated, work: float, seconds: float, start: float = 0.0
) -> tuple[float, float]:
    """Send as much as the window lets through; returns the work done per second in the second half, and its latency."""
    now, done, latencies = start, 0.0, []
    under_way: list[tuple[float, int, object, float]] = []
    number = 0
    while now < start + seconds:
        while window.has_room(work, 1):
            heapq.heappush(under_way, (server.answer_at(work, now), number, window.send(work, now), now))
            number += 1
        now, _, sent, at = heapq.heappop(under_way)
        window.on_delivered(sent, now)
        if now > start + seconds / 2:
            done += work
            latencies.append(now - at)
    for _, _, sent, _ in under_way:
        window.on_lost(sent)
    return done / (seconds / 2), sum(latencies) / len(latencies)


@pytest.mark.parametrize(("rate", "delay"), [(20_000, 0.04), (20_000, 0.2), (5_000, 0.04), (50_000, 0.001)])
def test_a_window_that_grows_keeps_its_server_busy_without_a_long_queue(rate, delay):
    server = Simulated(rate, delay)
    window = window_to(server)
    done, latency = drive(window, server, 500, 20.0)
    possible = min(rate, MAX_TOKENS / (delay + 500 / rate))
    assert done > 0.9 * possible
    assert latency < 3 * (delay + 2 * 500 / rate) + MIN_CALLS * 500 / rate


def test_no_server_is_given_more_than_its_owner_should_bear():
    server = Simulated(1e6, 1.0)
    window = window_to(server)
    under_way = []
    now = 0.0
    for _ in range(200):
        while window.has_room(500, 1):
            heapq.heappush(under_way, (server.answer_at(500, now), id(now), window.send(500, now)))
            assert window.in_flight <= MAX_TOKENS
        now, _, sent = heapq.heappop(under_way)
        window.on_delivered(sent, now)
    assert window.in_flight > 0.9 * (MAX_TOKENS - 1000)


def test_a_server_that_became_slow_is_given_less():
    window = window_to(Simulated(40_000, 0.1))
    drive(window, Simulated(40_000, 0.1), 500, 20.0)
    before = window.limit(1)
    drive(window, Simulated(4_000, 0.1), 500, 40.0, start=20.0)
    assert window.limit(1) < before / 3


def test_a_slow_server_is_expected_later_than_a_fast_one():
    fast, slow = window_to(Simulated(20_000, 0.04)), window_to(Simulated(4_000, 0.2))
    drive(fast, Simulated(20_000, 0.04), 500, 5.0)
    drive(slow, Simulated(4_000, 0.2), 500, 5.0)
    assert slow.seconds_for(500, 0.0) > 3 * fast.seconds_for(500, 0.0)


def test_calls_that_waited_for_the_first_question_make_no_server_slow():
    """A server that loads for three seconds before it answers anything, and is quick from then on."""
    window = CongestionWindow()
    calls = [window.send(500, 0.0) for _ in range(MIN_CALLS)]
    window.observe_rtt(3.0)
    for _ in calls:
        window.mark_started(3.0)
    for number, sent in enumerate(calls, start=1):
        window.on_delivered(sent, 3.0 + 0.05 * number)
    assert window.rate == pytest.approx(500 / 0.05)


def test_only_the_first_call_waits():
    window = CongestionWindow()
    window.mark_started(3.0)
    sent = window.send(500, 3.0)
    window.mark_started(3.9)  # it was asked for other blocks of its span, too
    window.on_delivered(sent, 4.0)
    assert window.rate == pytest.approx(500)


def test_calls_leave_one_after_the_other_at_the_measured_rate():
    window = CongestionWindow()
    window.send(500, 0.0)
    assert window.pause(0.0) == 0.0, "nothing is known yet"
    window.on_delivered(window.send(500, 0.0), 0.5)  # 1,000 a second
    gap = 500 / (WindowPolicy.startup_gain * window.rate)
    window.send(500, 1.0)
    window.send(500, 1.0)  # one that could not wait counts as well
    assert window.pause(1.0) == pytest.approx(2 * gap)
    assert window.pause(1.0 + gap) == pytest.approx(gap)
    assert window.pause(9.0) == 0.0


def test_calls_leave_more_slowly_once_the_rate_has_stopped_growing():
    window = CongestionWindow()
    for number in range(WindowPolicy.full_calls + 1):
        window.on_delivered(window.send(500, 1.0 + number), 1.5 + number)  # 1,000 a second
    window.send(500, 100.0)
    assert window.pause(100.0) == pytest.approx(0.5 / WindowPolicy.pacing_gain)


def test_answers_that_come_in_a_bunch_are_no_quicker_than_the_calls_were_sent():
    """They come together where they shared a link: ten that were sent within a second, half a second after the last."""
    window = CongestionWindow()
    sent = []
    for number in range(25):
        if number == 20:
            for call in sent[:16]:
                window.on_delivered(call, 2.0)
        sent.append(window.send(100, 0.1 * number))  # 1,000 a second
    for call in sent[16:]:
        window.on_delivered(call, 2.5)
    assert window.rate <= 1000 * (1 + 1e-9)


def test_calls_that_wait_somewhere_are_stretched():
    window, now = CongestionWindow(), 0.0
    window.observe_rtt(0.1)
    for took in (0.2, *[0.6] * 60):
        window.on_delivered(window.send(500, now), now + took)
        now += 1
    assert window.stretch == pytest.approx(3.0, rel=0.02)
    for _ in range(60):
        window.on_delivered(window.send(1000, now), now + 0.3)
        now += 1
    assert window.stretch == pytest.approx(1.0, rel=0.02), "twice the work, at the same pace"


def test_what_is_lost_is_no_longer_in_flight_and_measures_nothing():
    window = CongestionWindow()
    window.on_lost(window.send(500, 0.0))
    assert window.in_flight == 0
    assert window.rate is None


def test_an_idle_server_takes_anything():
    assert CongestionWindow().has_room(1e9, 1)


def test_a_few_calls_always_fit_however_unequal():
    window = CongestionWindow()
    window.on_delivered(window.send(500, 0.0), 0.1)
    for work in (897, 960, 943, 925):
        assert window.has_room(work, 1)
        window.send(work, 0.2)
    assert not window.has_room(400, 1)


def test_after_a_pause_the_window_opens_as_answers_come():
    server = Simulated(20_000, 0.2)
    window = window_to(server)
    drive(window, server, 500, 20.0)

    def fill(now: float) -> list:
        sent = []
        while window.has_room(500, 1):
            sent.append(window.send(500, now))
        return sent

    assert window.limit(1) > 3 * MIN_CALLS * 500
    at_first = fill(100.0)
    assert len(at_first) == MIN_CALLS, "all at once, they would share the link and all come late"
    window.on_delivered(at_first[0], 100.3)
    assert len(fill(100.3)) == 2


def test_of_small_questions_the_quickest_counts():
    window = CongestionWindow()
    for seconds in (0.3, 0.1, 0.5):
        window.observe_rtt(seconds)
    assert window.min_rtt == 0.1
    window.on_delivered(window.send(100, 1.0), 1.04)  # it was busy when it was asked
    assert window.min_rtt == pytest.approx(0.04)
    window.on_delivered(window.send(100, 2.0), 2.5)
    assert window.min_rtt == pytest.approx(0.04)


def test_answers_that_come_late_because_of_others_before_them_open_no_window():
    """A link that all calls share: the more are in flight, the longer each takes."""
    window = CongestionWindow()
    window.observe_rtt(0.04)
    rate, now, under_way = 700.0, 0.0, []
    for _ in range(300):
        while window.has_room(130, 1):
            under_way.append(window.send(130, now))
        now += 130 / rate
        window.on_delivered(under_way.pop(0), now)
    assert window.in_flight <= (MIN_CALLS + 1) * 130
