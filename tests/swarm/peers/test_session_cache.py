"""When a server is asked for room in its cache, and what is made of its refusals. No network, and no time passes."""

import itertools
from random import Random

import pytest

from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.session_cache import CachePolicy, SessionCache
from petals_eval.swarm.runtime import Runtime
from tests.support.fake_swarm import server, settings

WORDS = "Could not allocate 7000 bytes immediately: out of memory"


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.now = 1000.0

    def runtime(self, seed=0):
        return Runtime(monotonic=lambda: self.now, random=Random(seed))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(clock):
    return SessionCache("...aaaaaa", clock.runtime())


def refuse_when_due(cache, clock, need, seconds, step=0.05):
    """Ask whenever the cache lets, and be refused; returns when that was, counted from now."""
    began, asked = clock.now, []
    while clock.now - began < seconds:
        if cache.may_be_asked(need):
            asked.append(clock.now - began)
            cache.on_full(need, WORDS)
        clock.now += step
    return asked


def test_a_full_cache_is_asked_again_after_a_tenth_of_a_second_and_then_ever_later(cache, clock):
    asked = refuse_when_due(cache, clock, 10, seconds=60)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    for gap, wanted in zip(gaps, [CachePolicy.first_wait * 2**number for number in range(6)], strict=False):
        assert 0.8 * wanted <= gap <= 1.2 * wanted + 0.05
    assert all(0.8 * CachePolicy.longest_wait <= gap <= 1.2 * CachePolicy.longest_wait + 0.05 for gap in gaps[7:])


def test_two_clients_do_not_go_on_asking_at_the_same_moments(clock):
    caches = [SessionCache("...aaaaaa", clock.runtime(seed)) for seed in (1, 2)]
    for cache in caches:
        cache.on_full(10, WORDS)
    one, other = (cache.wait(10).seconds for cache in caches)
    assert abs(one - other) > 0.001


def test_those_refused_together_do_not_make_the_wait_longer(cache):
    for _ in range(20):
        cache.on_full(10, WORDS)
    assert cache.wait(10).seconds <= 1.2 * CachePolicy.first_wait


def test_a_smaller_session_need_not_wait_for_what_a_larger_one_was_refused(cache, clock):
    cache.on_full(100, WORDS)
    assert not cache.may_be_asked(100) and not cache.may_be_asked(200)
    assert cache.may_be_asked(99)
    cache.on_opened(50)
    assert not cache.may_be_asked(100), "that says nothing of the larger one"
    cache.on_full(60, WORDS)
    assert not cache.may_be_asked(60)
    clock.now += 60
    assert cache.may_be_asked(100)
    cache.on_opened(100)
    assert cache.wait(500) is None


def test_servers_are_known_apart():
    peers = PeerBook(settings())
    peers.of("a").cache.on_full(10, WORDS)
    assert peers.of("a").cache.wait(10) is not None and peers.of("b").cache.wait(10) is None


def test_the_most_that_was_free_is_what_was_seen_without_sessions_of_ours(cache):
    assert cache.most_free is None
    cache.observe_record(server("a", 0, 3, cache_tokens_left=1536).record)
    assert cache.most_free == 768, "the record counts keys and values apart"
    cache.observe_free(700)
    cache.observe_free(None)
    assert cache.most_free == 768
    cache.on_opened(10)
    cache.observe_free(900)
    assert cache.most_free == 768, "a session of ours was open"
    cache.on_ended(10)
    cache.observe_free(900)
    assert cache.most_free == 900


def test_a_session_larger_than_all_that_was_ever_free_is_told_of_at_once_and_fails_after_half_a_minute(cache, clock):
    cache.observe_free(4096)
    cache.on_full(15_000, WORDS)
    notice = cache.notice
    assert "15,000 tokens" in notice and "4,096" in notice and "30 s" in notice
    assert "15,000" in cache.wait(15_000).why and "4,096" in cache.wait(15_000).why
    assert cache.never_fits(15_000) is None
    refuse_when_due(cache, clock, 15_000, CachePolicy.patience - 6)
    assert cache.never_fits(15_000) is None
    refuse_when_due(cache, clock, 15_000, 12)
    why = cache.never_fits(15_000)
    assert "15,000 tokens" in why and "4,096" in why
    assert cache.never_fits(4096) is None
    assert cache.never_fits(20_000) is not None, "nor does a larger one"
    assert cache.notice == notice


def test_what_has_grown_meanwhile_is_waited_for_as_long_again(cache, clock):
    cache.observe_free(4096)
    refuse_when_due(cache, clock, 15_000, CachePolicy.patience - 2)
    cache.observe_free(8192)
    refuse_when_due(cache, clock, 15_000, 12)
    assert cache.never_fits(15_000) is None
    refuse_when_due(cache, clock, 15_000, CachePolicy.patience)
    assert "8,192" in cache.never_fits(15_000)


def test_what_nobody_asked_of_late_is_asked_once_more(cache, clock):
    """An hour later the server may have been restarted with a larger cache."""
    cache.observe_free(4096)
    refuse_when_due(cache, clock, 15_000, CachePolicy.patience + 10)
    clock.now += 3600
    assert cache.never_fits(15_000) is None and cache.may_be_asked(15_000)
    cache.on_full(15_000, WORDS)
    assert cache.never_fits(15_000) is not None


def test_a_session_that_fits_some_day_is_never_given_up(cache, clock):
    cache.observe_free(15_000)
    refuse_when_due(cache, clock, 15_000, 600)
    assert cache.never_fits(15_000) is None and cache.notice is None


def test_where_a_server_does_not_say_what_is_free_nothing_is_known_to_be_too_large(cache, clock):
    refuse_when_due(cache, clock, 15_000, 600)
    assert cache.never_fits(15_000) is None and cache.notice is None


def test_a_server_that_opens_no_session_is_left_alone_for_long_whatever_is_asked(cache, clock):
    cache.on_locked("it opens no session within 10 s")
    assert "may be locked" in cache.wait(0).why
    assert not cache.may_be_asked(1)
    assert cache.never_opens() is None
    clock.now += CachePolicy.locked_rest + 1
    assert cache.may_be_asked(1)


def test_refusals_of_what_a_server_says_it_has_room_for_are_a_lost_lock_if_they_go_on(cache, clock):
    """Openings that hang are counted as asked for, so that a locked server comes to refuse all of them."""
    for _ in range(10):
        cache.on_full(10, WORDS, shown_free=500)
        assert cache.wait(0) is None
        clock.now += CachePolicy.patience / 10
    cache.on_full(10, WORDS, shown_free=500)
    assert "500 tokens" in cache.wait(0).why and "may be locked" in cache.wait(0).why


@pytest.mark.parametrize("honest", [{}, {"shown_free": 5}])
def test_one_honest_refusal_ends_the_suspicion(cache, clock, honest):
    for _ in range(10):
        cache.on_full(10, WORDS, shown_free=500)
        clock.now += CachePolicy.patience / 10
    cache.on_full(10, WORDS, **honest)
    cache.on_full(10, WORDS, shown_free=500)
    assert cache.wait(0) is None


def test_sessions_of_another_kind_are_none_for_us_until_the_server_comes_back_as_another(cache, clock):
    cache.on_incompatible("its sessions have another layout")
    clock.now += 1e6
    assert cache.never_opens() == "its sessions have another layout" and not cache.may_be_asked(1)
    cache.ask_anew()
    assert cache.never_opens() is None and cache.may_be_asked(1)


def test_sessions_that_are_open_are_counted_on_when_the_server_is_asked_anew(cache):
    cache.on_opened(5)
    cache.ask_anew()
    cache.observe_free(100)
    assert cache.most_free is None, "a session of ours is still open there"
    cache.on_ended(5)
    cache.observe_free(100)
    assert cache.most_free == 100


def test_sessions_of_ours_leave_others_a_share_of_the_cache(cache):
    cache.on_opened(10)
    assert cache.leaves_others(10**9, 0.5), "nothing is known of the room"
    cache.on_ended(10)
    cache.observe_free(100)
    assert cache.leaves_others(90, 0.5), "the first of ours may take what it needs"
    cache.on_opened(20)
    assert cache.leaves_others(30, 0.5)
    assert not cache.leaves_others(31, 0.5)
    cache.on_opened(20)
    assert not cache.leaves_others(30, 0.5)
    cache.on_ended(20)
    assert cache.leaves_others(30, 0.5)
