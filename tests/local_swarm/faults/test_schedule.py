"""Schedules of faults: the same ones for a seed."""

from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.faults.schedule import Schedule


def test_a_schedule_is_the_same_for_a_seed_and_meets_every_fault():
    schedules = [Schedule.draw(seed, servers=[1, 2, 3], num_blocks=4, count=3) for seed in range(100)]
    assert schedules[7] == Schedule.draw(7, servers=[1, 2, 3], num_blocks=4, count=3)
    assert len({schedule.model_dump_json() for schedule in schedules}) == 100
    assert {type(each.fault) for schedule in schedules for each in schedule.activations} == set(f.FAULTS)
    for schedule in schedules:
        assert {each.server for each in schedule.activations} == {1, 2, 3}
        assert [each.at for each in schedule.activations] == sorted(each.at for each in schedule.activations)
        assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule
    only = Schedule.draw(0, servers=[5], kinds=[f.Noise])
    assert [(each.server, type(each.fault)) for each in only.activations] == [(5, f.Noise)]
