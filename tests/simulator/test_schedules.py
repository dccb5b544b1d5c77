"""Schedules of faults in virtual time: whatever happens, no row is lost, doubled or different, and no wait too long."""

import os
import subprocess
import sys

import pytest

from petals_eval.local_swarm.faults import catalog as f
from petals_eval.simulator.schedules import LYING, MIN_MICRO_BATCHES, REPLICAS, draw_schedule, run_schedule

TOGETHER = 80


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(24, id="hung calls are asked for again where they are free, one after the other"),
        pytest.param(95, id="a micro-batch that waits its turn again has its deadline all the same"),
        pytest.param(110, id="a server that was overtaken ten times is not waited for ten times as long"),
        pytest.param(140, id="where no replica is free one is looked for again before long"),
        pytest.param(311, id="what is pushed in vain takes the time of the first hop"),
        pytest.param(1607, id="a probe that an audit began and that hangs holds up no work"),
        pytest.param(1614, id="what only servers hold that are left alone for a moment is audited when they are not"),
        pytest.param(612, id="a probe that hangs holds up no push for as long as a call may take"),
    ],
)
def test_what_was_found_once_stays_mended(seed):
    assert run_schedule(seed).wrong == []


@pytest.mark.sample(1)
@pytest.mark.parametrize("first", range(0, 2000, TOGETHER))
def test_an_evaluation_through_faults_ends_as_if_there_were_none_or_says_why_not(first):
    found = [run_schedule(seed) for seed in range(first, first + TOGETHER)]
    assert {run.seed: run.wrong for run in found if run.wrong} == {}
    assert min(run.in_flight for run in found) > 0
    assert min(run.evaluated.micro_batches for run in found if not run.planned.nobody) >= MIN_MICRO_BATCHES
    stopped = [run.resumed is not None for run in found if run.planned.nobody]
    assert sum(stopped) > 0.8 * len(stopped)


def test_a_schedule_is_the_same_for_its_seed():
    assert draw_schedule(5) == draw_schedule(5) != draw_schedule(5, 1)
    assert run_schedule(5) == run_schedule(5)


def test_a_schedule_is_the_same_in_every_process():
    """Whatever the hashes of texts are, and wherever objects lie in memory: of those the hashes of tasks are made."""
    program = (
        "litter = [bytearray(size % 700) for size in range(5003)]\n"
        "from petals_eval.simulator.schedules import run_schedule\n"
        "print(run_schedule(1614))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == str(run_schedule(1614))


def test_schedules_have_every_fault_and_leave_a_majority_that_is_right():
    planned = [draw_schedule(seed) for seed in range(600)]
    kinds = {type(each.fault) for plan in planned for each in plan.scenario.faults if not plan.nobody}
    assert kinds == set(f.FAULTS)
    for plan in planned:
        for hop in range(3):
            here = [each.fault for each in plan.scenario.faults if each.server // REPLICAS == hop]
            assert len(here) < REPLICAS or plan.nobody
            if any(isinstance(fault, LYING) for fault in here):
                assert len(here) == 1, "a lie is seen by two that agree"
