"""When a server is asked for room in its cache, and what is made of its refusals. No network, and no time passes."""

import itertools
import random

import pytest
from petals_eval.swarm.peers.caches import FIRST_WAIT, LOCKED_REST, LONGEST_WAIT, PATIENCE, CacheBook

from tests.swarm.fakes import server

WORDS = "Could not allocate 7000 bytes immediately: out of memory"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(clock):
    return CacheBook(clock, random.Random(0))


def refuse_when_due(book, clock, need, seconds, step=0.05):
    """Ask whenever the book lets, and be refused; returns when that was, counted from now."""
    began, asked = clock.now, []
    while clock.now - began < seconds:
        if book.may_be_asked("a", need):
            asked.append(clock.now - began)
            book.refused("a", need, WORDS)
        clock.now += step
    return asked


def test_a_full_cache_is_asked_again_after_a_tenth_of_a_second_and_then_ever_later(book, clock):
    asked = refuse_when_due(book, clock, 10, seconds=60)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    for gap, wanted in zip(gaps, [FIRST_WAIT * 2**number for number in range(6)], strict=False):
        assert 0.8 * wanted <= gap <= 1.2 * wanted + 0.05
    assert all(0.8 * LONGEST_WAIT <= gap <= 1.2 * LONGEST_WAIT + 0.05 for gap in gaps[7:])


def test_two_clients_do_not_go_on_asking_at_the_same_moments(clock):
    books = CacheBook(clock, random.Random(1)), CacheBook(clock, random.Random(2))
    for book in books:
        book.refused("a", 10, WORDS)
    one, other = (book.wait("a", 10).seconds for book in books)
    assert abs(one - other) > 0.001


def test_those_refused_together_do_not_make_the_wait_longer(book):
    for _ in range(20):
        book.refused("a", 10, WORDS)
    assert book.wait("a", 10).seconds <= 1.2 * FIRST_WAIT


def test_a_smaller_session_need_not_wait_for_what_a_larger_one_was_refused(book, clock):
    book.refused("a", 100, WORDS)
    assert not book.may_be_asked("a", 100) and not book.may_be_asked("a", 200)
    assert book.may_be_asked("a", 99)
    book.opened("a", 50)
    assert not book.may_be_asked("a", 100), "that says nothing of the larger one"
    book.refused("a", 60, WORDS)
    assert not book.may_be_asked("a", 60)
    clock.now += 60
    assert book.may_be_asked("a", 100)
    book.opened("a", 100)
    assert book.wait("a", 500) is None


def test_servers_are_known_apart(book):
    book.refused("a", 10, WORDS)
    assert book.wait("b", 10) is None


def test_the_most_that_was_free_is_what_was_seen_without_sessions_of_ours(book):
    assert book.most_free("a") is None
    book.claimed(server("a", 0, 3, cache_tokens_left=1536))
    assert book.most_free("a") == 768, "the record counts keys and values apart"
    book.shown("a", 700)
    book.shown("a", None)
    assert book.most_free("a") == 768
    book.opened("a", 10)
    book.shown("a", 900)
    assert book.most_free("a") == 768, "a session of ours was open"
    book.ended("a")
    book.shown("a", 900)
    assert book.most_free("a") == 900


def test_a_session_larger_than_all_that_was_ever_free_is_told_of_at_once_and_fails_after_half_a_minute(book, clock):
    book.shown("a", 4096)
    book.refused("a", 15_000, WORDS)
    (notice,) = book.notices
    assert "15,000 tokens" in notice and "4,096" in notice and "30 s" in notice
    assert "15,000" in book.wait("a", 15_000).why and "4,096" in book.wait("a", 15_000).why
    assert book.never_fits("a", 15_000) is None
    refuse_when_due(book, clock, 15_000, PATIENCE - 6)
    assert book.never_fits("a", 15_000) is None
    refuse_when_due(book, clock, 15_000, 12)
    why = book.never_fits("a", 15_000)
    assert "15,000 tokens" in why and "4,096" in why
    assert book.never_fits("a", 4096) is None
    assert book.never_fits("a", 20_000) is not None, "nor does a larger one"
    assert len(book.notices) == 1


def test_what_has_grown_meanwhile_is_waited_for_as_long_again(book, clock):
    book.shown("a", 4096)
    refuse_when_due(book, clock, 15_000, PATIENCE - 2)
    book.shown("a", 8192)
    refuse_when_due(book, clock, 15_000, 12)
    assert book.never_fits("a", 15_000) is None
    refuse_when_due(book, clock, 15_000, PATIENCE)
    assert "8,192" in book.never_fits("a", 15_000)


def test_what_nobody_asked_of_late_is_asked_once_more(book, clock):
    """An hour later the server may have been restarted with a larger cache."""
    book.shown("a", 4096)
    refuse_when_due(book, clock, 15_000, PATIENCE + 10)
    clock.now += 3600
    assert book.never_fits("a", 15_000) is None and book.may_be_asked("a", 15_000)
    book.refused("a", 15_000, WORDS)
    assert book.never_fits("a", 15_000) is not None


def test_a_session_that_fits_some_day_is_never_given_up(book, clock):
    book.shown("a", 15_000)
    refuse_when_due(book, clock, 15_000, 600)
    assert book.never_fits("a", 15_000) is None and not book.notices


def test_where_a_server_does_not_say_what_is_free_nothing_is_known_to_be_too_large(book, clock):
    refuse_when_due(book, clock, 15_000, 600)
    assert book.never_fits("a", 15_000) is None and not book.notices


def test_a_server_that_opens_no_session_is_left_alone_for_long_whatever_is_asked(book, clock):
    book.locked("a", "it opens no session within 10 s")
    assert "may be locked" in book.wait("a", 0).why
    assert not book.may_be_asked("a", 1)
    assert book.never_opens("a") is None
    clock.now += LOCKED_REST + 1
    assert book.may_be_asked("a", 1)


def test_refusals_of_what_a_server_says_it_has_room_for_are_a_lost_lock_if_they_go_on(book, clock):
    """Openings that hang are counted as asked for, so that a locked server comes to refuse all of them."""
    for _ in range(10):
        book.refused("a", 10, WORDS, shown_free=500)
        assert book.wait("a", 0) is None
        clock.now += PATIENCE / 10
    book.refused("a", 10, WORDS, shown_free=500)
    assert "500 tokens" in book.wait("a", 0).why and "may be locked" in book.wait("a", 0).why


@pytest.mark.parametrize("honest", [{}, {"shown_free": 5}])
def test_one_honest_refusal_ends_the_suspicion(book, clock, honest):
    for _ in range(10):
        book.refused("a", 10, WORDS, shown_free=500)
        clock.now += PATIENCE / 10
    book.refused("a", 10, WORDS, **honest)
    book.refused("a", 10, WORDS, shown_free=500)
    assert book.wait("a", 0) is None


def test_sessions_of_another_kind_are_none_for_us_until_the_server_comes_back_as_another(book, clock):
    book.incompatible("a", "its sessions have another layout")
    clock.now += 1e6
    assert book.never_opens("a") == "its sessions have another layout" and not book.may_be_asked("a", 1)
    book.opened("b", 5)
    book.forget("a")
    book.forget("b")
    book.forget("nobody")
    assert book.never_opens("a") is None and book.may_be_asked("a", 1)
    book.shown("b", 100)
    assert book.most_free("b") is None, "a session of ours is still open there"
