"""Schedules of faults: the same ones for a seed."""

from petals_eval.local_swarm.faults import catalog as f


def test_a_schedule_is_the_same_for_a_seed_and_meets_every_fault():
    schedules = [f.Schedule.of(seed, servers=[1, 2, 3], span=(0, 4), count=3) for seed in range(100)]
    assert schedules[7] == f.Schedule.of(7, servers=[1, 2, 3], span=(0, 4), count=3)
    assert len({schedule.model_dump_json() for schedule in schedules}) == 100
    assert {type(each.fault) for schedule in schedules for each in schedule.switched} == set(f.FAULTS)
    for schedule in schedules:
        assert {each.server for each in schedule.switched} == {1, 2, 3}
        assert [each.at for each in schedule.switched] == sorted(each.at for each in schedule.switched)
        assert f.Schedule.model_validate_json(schedule.model_dump_json()) == schedule
    only = f.Schedule.of(0, servers=[5], kinds=[f.Noise])
    assert [(each.server, type(each.fault)) for each in only.switched] == [(5, f.Noise)]
