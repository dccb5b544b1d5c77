"""Micro-batches: every request once, budgets held, padding on the right."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_eval.data import MicroBatch, micro_batches


@dataclass(frozen=True)
class Asked:
    number: int
    input_ids: tuple[int, ...]


def requests_of(lengths: list[int]) -> list[Asked]:
    return [Asked(number, tuple(range(1, length + 1))) for number, length in enumerate(lengths)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=80),
    max_tokens=st.integers(1, 200),
    prefix=st.integers(0, 20),
    boundary=st.none() | st.integers(1, 80),
    max_rows=st.integers(1, 16),
    lookahead=st.integers(1, 40),
    tokens_ahead=st.integers(1, 400),
)
def test_every_request_comes_out_once_within_the_budgets(
    lengths, max_tokens, prefix, boundary, max_rows, lookahead, tokens_ahead
):
    asked = requests_of(lengths)
    limits = {"max_tokens": max_tokens, "prefix": prefix, "boundary": boundary, "max_rows": max_rows}
    batches = list(micro_batches(asked, **limits, lookahead=lookahead, tokens_ahead=tokens_ahead))
    assert sorted(request.number for batch in batches for request in batch.requests) == list(range(len(asked)))
    for batch in batches:
        rows, longest = batch.input_ids.shape
        assert rows == len(batch.requests) == len(batch.lengths) <= max_rows
        assert longest == max(batch.lengths)
        assert rows == 1 or rows * (prefix + longest) <= max_tokens
        assert boundary is None or len({prefix + length > boundary for length in batch.lengths}) == 1
        for request, ids, length in zip(batch.requests, batch.input_ids, batch.lengths, strict=True):
            assert tuple(ids[:length].tolist()) == request.input_ids
            assert not ids[length:].any()


def test_a_row_longer_than_the_budget_goes_alone():
    batches = list(micro_batches(requests_of([5, 50, 6]), max_tokens=20))
    assert [batch.lengths for batch in batches] == [(50,), (6, 5)]


def test_the_prefix_counts_for_every_row():
    lengths = [len(batch.requests) for batch in micro_batches(requests_of([4] * 6), max_tokens=24, prefix=8)]
    assert lengths == [2, 2, 2]


def test_rows_are_padded_on_the_right_with_lengths_stored():
    batch = MicroBatch.of([Asked(0, (7, 8, 9)), Asked(1, (5,))])
    assert batch.input_ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.lengths == (3, 1)


def test_the_longest_of_a_window_come_first():
    batches = list(micro_batches(requests_of([3, 9, 1, 7]), max_tokens=1))
    assert [batch.lengths[0] for batch in batches] == [9, 7, 3, 1]


def test_no_more_is_read_ahead_than_the_lookahead():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Asked(read, (1, 2, 3))

    batches = micro_batches(endless(), max_tokens=30, lookahead=50)
    next(batches)
    assert read == 5  # the first need not wait for more
    for _ in range(3):
        next(batches)
    assert read == 55


def test_long_requests_are_not_held_back_in_numbers():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Asked(read, (1,) * 50)

    batches = micro_batches(endless(), max_tokens=50, lookahead=1000, tokens_ahead=1000)
    next(batches)
    assert read == 2  # a tenth at first
    next(batches)
    next(batches)
    assert read == 2 + 20


def test_the_budget_may_change_while_batches_are_made():
    budgets = iter([10, 20, 5])
    lengths = [len(batch.requests) for batch in micro_batches(requests_of([5] * 7), max_tokens=lambda: next(budgets))]
    assert lengths == [2, 4, 1]


def test_nothing_in_nothing_out():
    assert list(micro_batches([], max_tokens=100)) == []
