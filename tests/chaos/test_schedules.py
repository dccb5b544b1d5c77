"""A fixed, short set of the seeded schedules; `python scripts/chaos.py --schedules 200` runs as many as are wanted."""

import pytest

from tests.chaos.schedules import KINDS, LYING, SAYS, Chaos, plan

SEEDS = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 23)
"""Twelve over replicas, with every kind of fault; two without any server left: crashed ones, and ones that refuse."""


@pytest.fixture(scope="module")
def chaos(realdata, tmp_path_factory):
    with Chaos(realdata, tmp_path_factory.mktemp("chaos")) as chaos:
        yield chaos


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_through_faults_ends_as_the_quiet_run_or_says_why_not(seed, chaos):
    outcome = chaos.run(seed)
    assert outcome.wrong == [], outcome
    assert outcome.has_hit, "no fault met a call under way"


def test_the_short_set_has_every_kind_of_fault():
    planned = [plan(seed) for seed in SEEDS]
    kinds = {type(each.fault) for plan in planned for each in plan.schedule.activations if not plan.nobody}
    assert kinds == set(KINDS)


def test_schedules_are_drawn_by_their_seed_and_leave_a_majority_that_is_right():
    for seed in range(200):
        planned = plan(seed)
        assert plan(seed) == planned
        assert plan(seed, attempt=1).schedule != planned.schedule
        for span in (0, 1):
            here = [type(each.fault) for each in planned.schedule.activations if each.server // 3 == span]
            if planned.nobody:
                assert len(here) == 3 * span
            elif any(kind in LYING for kind in here):
                assert len(here) == 1, "a lie is seen by two that agree"
            else:
                assert len(here) < 3
    nobody = {type(plan(seed).schedule.activations[0].fault) for seed in range(200) if plan(seed).nobody}
    assert nobody == set(SAYS)
