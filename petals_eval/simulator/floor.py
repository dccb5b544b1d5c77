"""The floor of a run: seconds that no client can undercut on these servers and links."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from petals_eval.simulator.scenario import Scenario
from petals_eval.swarm.wire.server_info import may_push
from petals_eval.swarm.wire.span import Span

__all__ = ["RunFloor", "run_floor"]

_BYTES_PER_MEGABIT = 125_000


@dataclass(frozen=True, slots=True)
class RunFloor:
    """flow: seconds that the busiest server or link needs when the work is spread as well as can be.
    one_pass: seconds of delay on the nearest route: the last row has yet to take it when all others are through.
    """

    flow: float
    one_pass: float

    @property
    def seconds(self) -> float:
        """
        >>> RunFloor(flow=9.0, one_pass=1.5).seconds
        10.5
        """
        return self.flow + self.one_pass


@dataclass(frozen=True, slots=True)
class _Leg:
    """A part of a server's span that a route may take."""

    server: int
    span: Span


def run_floor(scenario: Scenario) -> RunFloor:
    """Return the floor of a scenario whose servers stay as they are.

    Positions flow from the first block to the last like water, along every route at once: a linear program that
    minimises the seconds in which each server computes its share at its pace, and each direction of each link, the
    client's own among them, moves its bytes at its rate. Where servers may push to each other the client's uplink
    carries positions once and not once a hop. What a call costs beside its positions is left out, and so is the
    client's processor: a floor is what cannot be undercut.
    """
    legs = list(_legs(scenario))
    return RunFloor(_best_flow(scenario, legs), _nearest_pass(scenario, legs))


def _legs(scenario: Scenario) -> Iterable[_Leg]:
    """Yield the parts of spans between blocks at which any server begins or ends.

    Others bring nothing. Between two such blocks the holders stay the same, so a change of server somewhere between
    them computes what a mixture of changes at both computes, and carries as many bytes.
    """
    edges = sorted({0, scenario.blocks} | {edge for each in scenario.servers for edge in _ends(each.blocks)})
    for index, server in enumerate(scenario.servers):
        inside = [edge for edge in edges if server.blocks.start <= edge <= server.blocks.stop]
        for at, start in enumerate(inside):
            yield from (_Leg(index, Span(start, stop)) for stop in inside[at + 1 :])


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop


def _best_flow(scenario: Scenario, legs: list[_Leg]) -> float:
    """Return the least seconds in which all positions flow through: positions on each leg, and seconds, are unknown."""
    servers, client = scenario.servers, scenario.client
    pushes = scenario.settings.get("push") != "never" and all(may_push(server.version) for server in servers)
    into, limits = list[tuple[int, int, float]](), list[tuple[int, int, float]]()  # row, column, value
    capacities = 3 * len(servers) + 2  # rows: of each server its time and its link up and down, then the client's
    client_rows = ((capacities - 2, client.up_mbps), (capacities - 1, client.down_mbps))
    for column, leg in enumerate(legs):
        server, span = servers[leg.server], leg.span
        into.append((span.start, column, 1.0))
        if span.stop < scenario.blocks:
            into.append((span.stop, column, -1.0))
        share = len(span) / len(server.blocks)
        limits.append((3 * leg.server, column, share / server.tokens_per_second))
        links = ((3 * leg.server + 1, server.link.up_mbps), (3 * leg.server + 2, server.link.down_mbps))
        for row, mbps in (*links, *client_rows):
            if mbps is not None and not (pushes and row == capacities - 2 and span.start > 0):
                links_alike = scenario.clients if row >= capacities - 2 else 1
                limits.append((row, column, scenario.bytes_per_position / (links_alike * mbps * _BYTES_PER_MEGABIT)))
    limits += [(row, len(legs), -1.0) for row in range(capacities)]
    cost, sources = np.zeros(len(legs) + 1), np.zeros(scenario.blocks)
    cost[-1], sources[0] = 1.0, scenario.clients * sum(scenario.lengths)
    best = linprog(
        cost,
        A_ub=_sparse(limits, (capacities, len(legs) + 1)),
        b_ub=np.zeros(capacities),
        A_eq=_sparse(into, (scenario.blocks, len(legs) + 1)),
        b_eq=sources,
    )
    return float(best.fun)


def _sparse(entries: list[tuple[int, int, float]], shape: tuple[int, int]) -> coo_array:
    rows, columns, values = zip(*entries, strict=True)
    return coo_array((values, (rows, columns)), shape=shape)


def _nearest_pass(scenario: Scenario, legs: list[_Leg]) -> float:
    """Return the delays of the nearest route, there and back at each hop (Dijkstra's shortest path over blocks)."""
    onward: dict[int, list[_Leg]] = {}
    for leg in legs:
        onward.setdefault(leg.span.start, []).append(leg)
    reached, heap = set[int](), [(0.0, 0)]
    while heap:
        seconds, block = heapq.heappop(heap)
        if block == scenario.blocks:
            return seconds
        if block not in reached:
            reached.add(block)
            for leg in onward[block]:
                heapq.heappush(heap, (seconds + 2 * scenario.servers[leg.server].link.delay, leg.span.stop))
    raise ValueError(f"expected a route through blocks 0:{scenario.blocks}, found none")
