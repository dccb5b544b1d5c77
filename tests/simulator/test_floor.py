"""The floor of a run, against what can be reckoned by hand and against every way to share the work out."""

import itertools
import math
from random import Random

import numpy as np
import pytest

from petals_eval.local_swarm.network import LinkProfile
from petals_eval.simulator.floor import run_floor
from petals_eval.simulator.scenario import Client, Scenario, Server
from petals_eval.swarm.wire.span import Span

POSITIONS = 1000


def server(start, stop, pace=1000.0, *, delay=0.0, up=None, down=None):
    return Server(blocks=Span(start, stop), link=LinkProfile(delay, 0.0, up, down), tokens_per_second=pace)


def scenario(blocks, *servers, client=None, hidden_size=250, push="never"):
    """A thousand positions; with 250 values of float32 a position has 1,000 bytes, and all of them 8 megabits."""
    work = {"rows": 100, "tokens": (10, 10), "hidden_size": hidden_size}
    return Scenario(blocks=blocks, servers=servers, client=client or Client(), settings={"push": push}, **work)


def test_a_chain_is_as_slow_as_its_slowest_server():
    assert run_floor(scenario(4, server(0, 2, 1000), server(2, 4, 250))).flow == pytest.approx(4.0)


def test_replicas_share_by_their_paces():
    assert run_floor(scenario(2, server(0, 2, 600), server(0, 2, 400))).flow == pytest.approx(1.0)


@pytest.mark.parametrize("link", [{"up": 2.0}, {"down": 2.0}, {"up": 2.0, "down": 8.0}])
def test_each_direction_of_a_link_counts(link):
    assert run_floor(scenario(2, server(0, 2, 1e6, **link))).flow == pytest.approx(4.0)


@pytest.mark.parametrize("client", [Client(up_mbps=4.0), Client(down_mbps=4.0)])
def test_the_clients_link_carries_every_hop(client):
    servers = [server(start, start + 1, 1e6) for start in range(3)]
    assert run_floor(scenario(3, *servers, client=client)).flow == pytest.approx(6.0)


def test_servers_that_push_spare_the_uplink_alone():
    servers = [server(start, start + 1, 1e6) for start in range(3)]
    assert run_floor(scenario(3, *servers, client=Client(up_mbps=4.0), push="auto")).flow == pytest.approx(2.0)
    assert run_floor(scenario(3, *servers, client=Client(down_mbps=4.0), push="auto")).flow == pytest.approx(6.0)


def test_a_server_takes_a_part_of_its_span_where_another_takes_the_rest():
    """Blocks 0:3 of one and 1:4 of the other: they meet at block 1 or at block 3, half of the positions each."""
    assert run_floor(scenario(4, server(0, 3, 1000), server(1, 4, 1000))).flow == pytest.approx(2 / 3)


def test_the_last_pass_takes_the_nearest_route_and_not_the_nearest_hop():
    near_and_short = server(0, 1, delay=0.01), server(1, 4, delay=0.5)
    found = run_floor(scenario(4, *near_and_short, server(0, 4, delay=0.1)))
    assert found.one_pass == pytest.approx(0.2)


def routes(chosen, block=0):
    """Every route, as legs (server, blocks); a leg may end at any block."""
    if block == chosen.blocks:
        yield ()
    for index, each in enumerate(chosen.servers):
        if block in each.blocks:
            for stop in range(block + 1, each.blocks.stop + 1):
                for rest in routes(chosen, stop):
                    yield ((index, stop - block), *rest)


def seconds_each(chosen, route):
    """Seconds that each part is busy with a position on this route: servers, their links, the client's."""
    busy = np.zeros(3 * len(chosen.servers) + 2)
    megabits = chosen.bytes_per_position * 8 / 1e6
    for index, blocks in route:
        each = chosen.servers[index]
        busy[3 * index] += blocks / len(each.blocks) / each.tokens_per_second
        for part, mbps in (
            (3 * index + 1, each.link.up_mbps),
            (3 * index + 2, each.link.down_mbps),
            (-2, chosen.client.up_mbps),
            (-1, chosen.client.down_mbps),
        ):
            busy[part] += 0.0 if mbps is None else megabits / mbps
    return busy


def shares(parts, whole):
    """Every way to share `whole` units out among so many: (ways, parts)."""
    bars = np.array(list(itertools.combinations(range(whole + parts - 1), parts - 1)), dtype=int)
    edges = np.pad(bars.reshape(-1, parts - 1), ((0, 0), (1, 1)), constant_values=((0, 0), (-1, whole + parts - 1)))
    return np.diff(edges, axis=1) - 1


@pytest.mark.sample(12)
@pytest.mark.parametrize("seed", range(200))
def test_no_way_to_share_the_work_out_is_quicker(seed):
    draws = Random(seed)
    mbps = lambda: draws.choice([None, draws.uniform(1, 20)])  # noqa: E731 - drawn anew for each link
    blocks = draws.choice([2, 3])
    spans = [(0, blocks)] if draws.random() < 0.5 else [(0, 1), (1, blocks)]
    spans.append(tuple(sorted(draws.sample(range(blocks + 1), 2))))
    servers = [server(*span, draws.uniform(200, 2000), up=mbps(), down=mbps()) for span in spans]
    chosen = scenario(blocks, *servers, client=Client(up_mbps=mbps(), down_mbps=mbps()))
    ways = list(routes(chosen))
    units = next(n for n in (400, 100, 40, 20, 10, 5, 3) if math.comb(n + len(ways) - 1, n) < 100_000)
    each = np.array([seconds_each(chosen, way) for way in ways])
    best = (shares(len(ways), units) @ each).max(axis=1).min() * POSITIONS / units
    flow = run_floor(chosen).flow
    assert flow <= best * (1 + 1e-9)
    assert best <= flow * (1 + 2 * len(ways) / units), "the best share in whole units is within a unit of the floor"
