"""Which rows are shots: drawn by the seed, never the question itself, and as lm-evaluation-harness draws them."""

from collections import Counter
from random import Random

import pytest
from pydantic import ValidationError

from petals_eval.data import rows_of
from petals_eval.errors import DataError
from petals_eval.tasks.shots import Shots, draw_shots


def numbers(count, name="numbers"):
    return rows_of(
        [{"text": f"row {index}", "label": "odd" if index % 2 else "even"} for index in range(count)], name=name
    )


def drawn(settings, pool, evaluated=None, *, seed=1, is_shared=False):
    """The positions of the shots of each evaluated row."""
    evaluated = pool if evaluated is None else evaluated
    draw = draw_shots(
        Shots(**settings), pool, evaluated, seed=seed, is_shared=is_shared, label_of=lambda row: row.columns["label"]
    )
    return [[shot.index for shot in draw.rows_for(row)] for row in evaluated]


def test_a_fixed_draw_is_the_same_for_all_rows_and_reproducible():
    pool = numbers(50)
    found = drawn({"count": 4}, pool)
    assert found == [found[0]] * 50
    assert len(set(found[0])) == 4
    assert drawn({"count": 4}, pool)[0] == found[0]
    assert drawn({"count": 4}, pool, seed=2)[0] != found[0]
    random, left = Random("1"), list(range(50))
    for last in range(49, -1, -1):
        at = int(random.random() * (last + 1))
        left[at], left[last] = left[last], left[at]
    assert found[0] == left[:-5:-1] == [23, 2, 5, 40]  # on every machine, and with every version of Python


def test_every_row_is_drawn_as_often_as_any_other():
    pool = numbers(10)
    counts = Counter(shot for seed in range(2000) for shot in drawn({"count": 3}, pool, pool, seed=seed)[0])
    assert sorted(counts) == list(range(10))
    assert all(600 * 0.85 < count < 600 * 1.15 for count in counts.values())


def test_the_first_rows():
    assert drawn({"count": 3, "draw": "first"}, numbers(9))[5] == [0, 1, 2]


def test_shots_of_a_row_do_not_depend_on_what_else_is_evaluated():
    import numpy as np

    pool, settings = numbers(60), {"count": 5, "draw": "row"}
    whole = drawn(settings, pool, is_shared=True)
    assert len({tuple(shots) for shots in whole}) > 50
    for part in (np.arange(0, 60, 3), np.arange(1, 60, 3), np.arange(2, 60, 3)):
        assert drawn(settings, pool, pool.at(part), is_shared=True) == [whole[index] for index in part]


def test_a_row_is_no_shot_of_its_own_and_neither_is_its_like():
    pool = rows_of([{"text": f"row {index // 2}", "label": "even"} for index in range(12)])
    for index, shots in enumerate(drawn({"count": 9, "draw": "row"}, pool, is_shared=True)):
        assert not {index, index ^ 1} & set(shots)
    with pytest.raises(DataError, match="expected at least 11 rows to draw from in data, found 10"):
        drawn({"count": 11, "draw": "row"}, pool, is_shared=True)


def test_what_equals_a_row_is_no_shot_of_it_wherever_shots_come_from_unless_that_is_asked_for():
    pool, evaluated = numbers(4), numbers(4, name="others")
    default = drawn({"count": 3, "draw": "row"}, pool, evaluated)
    assert not any(index in shots for index, shots in enumerate(default))
    as_it_comes = drawn({"count": 3, "draw": "row", "leave_out_self": False}, pool, evaluated)
    assert any(index in shots for index, shots in enumerate(as_it_comes))


def test_a_column_that_one_of_both_lacks_tells_no_rows_apart():
    hidden = rows_of([{"text": f"row {index}"} for index in range(4)])
    for index, shots in enumerate(drawn({"count": 3, "draw": "row"}, numbers(4), hidden)):
        assert index not in shots


@pytest.mark.parametrize("how", ["fixed", "row"])
def test_a_balanced_draw_has_as_many_rows_of_each_label(how):
    pool = rows_of([{"text": str(index), "label": "abc"[min(index // 10, 2)]} for index in range(60)])
    for count, sizes in ((6, [2, 2, 2]), (7, [2, 2, 3])):
        for shots in drawn({"count": count, "draw": how, "balanced": True}, pool):
            assert sorted(Counter(min(index // 10, 2) for index in shots).values()) == sizes
    orders = {
        tuple(min(index // 10, 2) for index in shots)
        for shots in drawn({"count": 6, "draw": "row", "balanced": True}, pool)
    }
    assert len(orders) > 10  # labels do not stand in their own order
    with pytest.raises(DataError, match="expected at least 20 rows of each label to draw from in data, found 10"):
        drawn({"count": 60, "draw": how, "balanced": True, "leave_out_self": False}, pool)


@pytest.mark.parametrize("pool_size", [8, 400])
def test_draws_like_those_of_lm_evaluation_harness(pool_size):
    """ContextSampler.sample of 0.4.13: one generator for all documents, in their order."""
    pool, evaluated = numbers(pool_size), numbers(20, name="others")
    random = Random(1234)
    expected = [random.sample(list(range(pool_size)), 5) for _ in range(20)]
    settings = {"count": 5, "draw": "lm_eval"}
    assert drawn({**settings, "leave_out_self": False}, pool, evaluated, seed=1234) == expected
    for index, (shots, before) in enumerate(zip(drawn(settings, pool, evaluated, seed=1234), expected, strict=True)):
        assert index not in shots
        if index not in before:  # another row's question among its shots does not change these
            assert shots == before


def test_its_draws_for_tasks_whose_shots_may_hold_the_document():
    """It draws one more and takes out what equals the document."""
    pool = evaluated = numbers(20)
    random = Random(7)
    expected = [[at for at in random.sample(list(range(20)), 6) if at != index][:5] for index in range(20)]
    assert drawn({"count": 5, "draw": "lm_eval"}, pool, evaluated, seed=7, is_shared=True) == expected


def test_its_draws_where_a_document_is_there_more_than_once():
    pool = rows_of(
        [{"text": "same", "label": "even"}] * 3 + [{"text": str(index), "label": "odd"} for index in range(3)]
    )
    random = Random(3)
    found = drawn({"count": 3, "draw": "lm_eval"}, pool, is_shared=True, seed=3)
    for index, shots in enumerate(found):
        same = set(range(3)) if index < 3 else {index}
        expected = [at for at in random.sample(range(6), 4) if at not in same][:3]
        if len(expected) < 3:
            expected = random.sample([at for at in range(6) if at not in same], 3)
        assert shots == expected


def test_a_part_of_the_rows_gets_the_harness_draws_of_the_whole():
    """The generator has a state, so the draws are made for all rows and looked up by a part of them."""
    pool = numbers(30)
    draw = draw_shots(Shots(count=4, draw="lm_eval"), pool, pool, seed=1, is_shared=True)
    whole = [[shot.index for shot in draw.rows_for(row)] for row in pool]
    assert [[shot.index for shot in draw.rows_for(row)] for row in list(pool)[::-1]] == whole[::-1]


def test_too_few_rows():
    with pytest.raises(DataError, match=r"expected at least 8 rows to draw from in numbers, found 5\. Ask for fewer"):
        drawn({"count": 8}, numbers(5))
    with pytest.raises(DataError, match="expected at least 8"):
        drawn({"count": 8, "draw": "first"}, numbers(5))
    with pytest.raises(DataError, match="expected at least 6"):
        drawn({"count": 5, "draw": "lm_eval"}, numbers(5), is_shared=True)
    own = Shots(count=5, draw="row")
    with pytest.raises(DataError, match="expected at least 5 rows to draw from in numbers, found 4"):  # not mid-run
        draw_shots(own, numbers(5), numbers(5), seed=1, is_shared=True)
    draw_shots(own, numbers(5), numbers(5), seed=1, is_shared=False)


def test_what_shots_there_are_is_told_by_a_hash():
    def sha256(pool, **settings):
        return draw_shots(Shots(**{"count": 2, **settings}), pool, pool, seed=1, is_shared=False).sha256

    pool = numbers(9)
    renamed, longer = numbers(9, name="another"), numbers(10)
    assert sha256(pool) == sha256(renamed)
    for how in ("row", "lm_eval"):
        assert sha256(pool, draw=how) == sha256(renamed, draw=how)
        assert sha256(pool, draw=how) != sha256(longer, draw=how)
    assert len({sha256(pool), sha256(pool, draw="first"), sha256(pool, draw="row"), sha256(pool, draw="lm_eval")}) == 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "should have a count"),
        ({"count": -1}, "greater than or equal to 0"),
        ({"count": 3, "rows": [{"text": "a"}]}, "a count of at most 1"),
        ({"rows": [{"text": "a"}], "data": {"path": "a.csv"}}, "rows or data to draw them from, not both"),
        ({"count": 2, "draw": "lm_eval", "balanced": True}, "should not be balanced with draw: lm_eval"),
        ({"count": 2, "draw": "random"}, "'fixed', 'first', 'row' or 'lm_eval'"),
        ({"number": 2}, "Extra inputs"),
    ],
)
def test_definitions_that_mean_nothing(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        Shots(**settings)


def test_rows_that_are_written_out_are_taken_in_their_order():
    settings = Shots(rows=[{"text": "b"}, {"text": "a"}])
    assert (settings.number, settings.how) == (2, "first")
    assert Shots(rows=[{"text": "b"}, {"text": "a"}], count=1).number == 1
