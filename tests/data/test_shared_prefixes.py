"""What rows have in common: found in any order of any rows, and never beyond what is asked of one."""

from dataclasses import dataclass
from random import Random

import pytest

from petals_eval.data.shared_prefixes import prefixed_batches


@dataclass(frozen=True)
class Row:
    key: str
    input_ids: tuple[int, ...]
    asked: int


def batches(rows, lane_rows=4, **options):
    return list(
        prefixed_batches(
            rows, max_tokens=64, lane_rows=lambda positions: lane_rows, asked_from=lambda row: row.asked, **options
        )
    )


def few_shot(count, shots=(1, 2, 3, 4, 5, 6, 7, 8)):
    draws = Random(0)
    texts = [(*shots, *(draws.randrange(10, 99) for _ in range(draws.randrange(3, 7)))) for _ in range(count)]
    return [Row(str(at), text, len(text) - 1) for at, text in enumerate(texts)]


def check(rows, found):
    """Every row once, and what a micro-batch shares is where its rows begin."""
    assert sorted((row.key, row.input_ids) for batch in found for row in batch.requests) == sorted(
        (row.key, row.input_ids) for row in rows
    )
    of_context: dict = {}
    for batch in found:
        shared = batch.shared
        if shared is None:
            continue
        assert len(batch.requests) <= shared.rows
        for at, row in enumerate(batch.requests):
            assert row.input_ids[: len(shared.common)] == shared.common
            assert shared.length <= row.asked and len(row.input_ids) <= shared.longest
            context = row.input_ids[len(shared.common) : shared.length]
            assert of_context.setdefault((id(shared), at), context) == context or not shared.context


def test_the_beginning_of_all_rows_is_found_and_kept(count=500):
    rows = few_shot(count)
    found = batches(rows)
    check(rows, found)
    commons = {batch.shared.common for batch in found}
    assert commons == {(1, 2, 3, 4, 5, 6, 7, 8)}
    assert sum(len(batch.requests) < 4 for batch in found) <= 2, "one short micro-batch a window"


def test_rows_that_begin_otherwise_do_not_spoil_it():
    rows = [*few_shot(40), *(Row(f"other {at}", (9, 9, at + 1), 2) for at in range(5))]
    found = batches(rows)
    check(rows, found)
    assert {batch.shared.common for batch in found if batch.shared} == {(1, 2, 3, 4, 5, 6, 7, 8)}
    assert sum(len(batch.requests) for batch in found if batch.shared is None) == 5


def test_rows_without_anything_in_common_go_as_ever():
    rows = [Row(str(at), (at + 1, 5, 6), 2) for at in range(20)]
    assert all(batch.shared is None for batch in batches(rows))
    tuned = batches(rows, prefix=16)
    check(rows, tuned)
    assert all(batch.shared.common == () and batch.shared.context == 0 for batch in tuned)


def choices(examples, count=4, shots=(1, 2, 3)):
    draws = Random(1)
    rows = []
    for at in range(examples):
        context = (*shots, *(draws.randrange(10, 99) for _ in range(draws.randrange(5, 12))))
        for _ in range(count):
            text = (*context, *(draws.randrange(10, 99) for _ in range(draws.randrange(1, 4))))
            rows.append(Row(str(at), text, len(context) - 1))
    return rows


def test_the_contexts_of_choices_are_found():
    rows = choices(30)
    found = batches(rows)
    check(rows, found)
    assert {batch.shared.common for batch in found} == {(1, 2, 3)}
    computed = sum(len(batch.requests) * (batch.input_ids.shape[1] - batch.shared.length) for batch in found)
    contexts = {id(batch.shared): len(batch.requests) * batch.shared.context for batch in found}
    whole = sum(len(row.input_ids) for row in rows)
    assert computed + sum(contexts.values()) < 0.55 * whole, "rows whose contexts are of like length share a lane"


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_are_all_there_and_share_what_they_share(seed):
    draws = Random(seed)
    rows = []
    for at in range(draws.randrange(1, 60)):
        text = tuple(draws.choice((1, 1, 1, 2)) for _ in range(draws.randrange(1, 9)))
        for _ in range(draws.choice((1, 1, 3))):
            more = (*text, *(draws.randrange(1, 4) for _ in range(draws.randrange(0, 3))))
            rows.append(Row(str(at), more, draws.randrange(len(more))))
    prefix, boundary = draws.choice((0, 3)), draws.choice((None, 7))
    check(rows, batches(rows, lane_rows=draws.randrange(1, 6), prefix=prefix, boundary=boundary))
