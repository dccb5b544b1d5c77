"""Scenarios drawn by a seed: swarms of unequal servers behind unequal links."""

import itertools
import math
from random import Random
from typing import Literal

from petals_eval.local_swarm.network import LinkProfile
from petals_eval.simulator.floor import run_floor
from petals_eval.simulator.scenario import Scenario, Server
from petals_eval.swarm.wire.span import Span

__all__ = ["draw_scenario"]

_BLOCKS, _SERVERS = (8, 80), (5, 40)
_DELAYS, _MBPS = (0.0025, 0.15), (5.0, 1000.0)  # seconds one way, and each way
_PACES = 10.0  # times the slowest's that of the quickest is at most
_HIDDEN_SIZES = (256, 1024, 4096)
_DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
_TOKENS = (24, 136)
_FLOORS = (20.0, 120.0)  # seconds


def draw_scenario(seed: int) -> Scenario:
    """Return a swarm: 8 to 80 blocks on 5 to 40 servers, with as many rows as give a floor of 20 to 120 seconds.

    Servers hold spans of their own choice that leave no block out; paces lie within 1:10 of each other, round trips
    between 5 and 300 ms, rates between 5 and 1,000 Mbit/s each way; claims are true within a factor of two.
    """
    draws = Random(seed)
    blocks, count = draws.randint(*_BLOCKS), draws.randint(*_SERVERS)
    slowest_pace = _log_uniform(draws, 500.0, 5000.0)  # tokens a second through a span
    servers = []
    for span in _spans(draws, blocks, count):
        pace = slowest_pace * _log_uniform(draws, 1.0, _PACES)
        servers.append(
            Server(
                blocks=span,
                link=LinkProfile(
                    _log_uniform(draws, *_DELAYS), 0.0, _log_uniform(draws, *_MBPS), _log_uniform(draws, *_MBPS)
                ),
                tokens_per_second=pace,
                claimed_pace=pace * len(span) * _log_uniform(draws, 0.5, 2.0),
            )
        )
    scenario = Scenario(
        blocks=blocks,
        hidden_size=draws.choice(_HIDDEN_SIZES),
        dtype=draws.choice(_DTYPES),
        rows=1000,
        tokens=_TOKENS,
        servers=tuple(servers),
        seed=seed,
    )
    rows = math.ceil(scenario.rows * draws.uniform(*_FLOORS) / run_floor(scenario).flow)
    return scenario.model_copy(update={"rows": rows})


def _log_uniform(draws: Random, least: float, most: float) -> float:
    return math.exp(draws.uniform(math.log(least), math.log(most)))


def _spans(draws: Random, blocks: int, count: int) -> list[Span]:
    """Return a span for each server: some that hold every block one after the other, and the rest anywhere."""
    hops = draws.randint(2, min(count, blocks, 10))
    edges = [0, *sorted(draws.sample(range(1, blocks), hops - 1)), blocks]
    spans = [Span(start, stop) for start, stop in itertools.pairwise(edges)]
    while len(spans) < count:
        if draws.random() < 0.7:
            spans.append(draws.choice(spans))
        else:
            length = draws.randint(1, max(1, 2 * blocks // hops))
            start = draws.randint(0, max(0, blocks - length))
            spans.append(Span(start, min(blocks, start + length)))
    return spans
