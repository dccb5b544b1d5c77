"""Which micro-batches are audited, and how likely a server is caught. No network."""

import math
import random

import pytest

from petals_eval.swarm.peers.sampling import Sampler
from petals_eval.swarm.trust.audit import catch_probability


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
