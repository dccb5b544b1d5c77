"""Which micro-batches are audited, and how likely a server is caught. No network."""

import asyncio
import math
import random

import pytest

from petals_eval.swarm.peers.sampling import Sampler, catch_probability
from tests.support.audited_run import BLOCKS, AuditedRun, float32, states
from tests.support.fake_swarm import forward, noise


@pytest.mark.parametrize(("n", "p", "share"), [(1, 0.5, 0.1), (2, 0.3, 0.1), (10, 0.2, 0.02), (60, 0.05, 0.1)])
def test_the_probability_of_catching_is_what_a_simulation_finds(n, p, share):
    draws, caught, rounds = random.Random(0), 0, 20_000
    for _ in range(rounds):
        sampler = Sampler(share, draws)
        corrupted = [draws.random() < p for _ in range(n)]
        checked = [index for index in range(n) if sampler.chooses(index)]
        checked += [index for index in [sampler.last_choice()] if index is not None]
        assert len(checked) == len(set(checked)) >= min(n, 2)
        caught += any(corrupted[index] for index in checked)
    expected = catch_probability(p, n, share)
    assert abs(caught / rounds - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)


@pytest.mark.parametrize(("n", "p", "share"), [(12, 0.3, 0.05), (30, 0.1, 0.1)])
def test_the_formula_holds_through_the_seam(n, p, share):
    """A server is wrong in some of its micro-batches, and is asked about nobody else's."""
    caught, rounds = 0, 200
    for seed in range(rounds):
        draws = random.Random(seed)
        run = AuditedRun(float32("wrong"), seed=seed, verify=share)
        # It is asked once more where it differs, honestly this time or not: it is named either way.
        run.blocks.spoil["wrong"] = lambda answer, question, d=draws: (
            noise(0.1)(answer, question) if d.random() < p else answer
        )

        async def everything(run=run):
            for index in range(n):
                run.hold(float32("wrong"))  # nobody else to route to
                task = asyncio.ensure_future(forward(run.pipe, states(index), stop=BLOCKS))
                await asyncio.sleep(0)
                run.hold(float32("wrong"), float32("a"), float32("b"))
                await asyncio.wait([task])
                while run.pipe.audit.progress().under_way:  # they must see everybody
                    await asyncio.sleep(0.001)
                if run.pipe.quarantine.findings:
                    break
            await run.pipe.audit.settle()

        asyncio.run(everything())
        assert set(run.statuses) <= {"wrong"}
        caught += run.statuses == {"wrong": "wrong"}
    expected = catch_probability(p, n, share)
    assert abs(caught / rounds - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)


def test_every_server_is_checked_twice_and_the_first_time_early():
    for seed in range(20):
        servers = float32("a", 0, 2), float32("a2", 0, 2), float32("b", 2, 4), float32("b2", 2, 4)
        run = AuditedRun(*servers, seed=seed)
        run.go(10)
        progress = run.pipe.audit.progress()
        used = [peer for peer in ("a", "a2", "b", "b2") if run.peers.of(peer).calls]
        at_least = sum(min(2, run.peers.of(peer).calls) for peer in used)
        assert progress.computed == 20
        assert at_least <= progress.done <= at_least + 4
        assert progress.under_way == progress.impossible == 0
        assert run.statuses == {}


def test_nothing_is_checked_where_nobody_else_holds_the_blocks_or_it_is_turned_off():
    for values, servers in [({}, [float32("a")]), ({"verify": 0}, [float32("a"), float32("b")])]:
        run = AuditedRun(*servers, **values)
        run.go(5)
        assert len(run.transport.calls) == 5
        assert run.pipe.audit.progress().done == 0


def test_a_replica_that_comes_later_finds_the_server_checked_at_once():
    run = AuditedRun(float32("a"))
    run.blocks.spoil["a"] = noise()
    run.go(5)
    assert run.statuses == {}
    run.hold(float32("a"), float32("b"), float32("c"))
    run.go(3)
    assert run.statuses == {"a": "wrong"}
