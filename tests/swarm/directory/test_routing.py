"""Routes: cheapest first, complete or none."""

from hypothesis import given
from hypothesis import strategies as st

from petals_eval.swarm.directory.routing import RouteIndex, hold_all, next_hop, plan_route
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import server


def per_block(**seconds: float):
    return lambda one, blocks: seconds.get(one.peer_id, 1.0) * blocks + 0.1


def named(route):
    return None if route is None else [(hop.peer_id, hop.span.start, hop.span.stop) for hop in route]


def test_fewer_hops_win_at_equal_speed():
    servers = [server("a", 0, 2), server("b", 2, 4), server("c", 0, 4)]
    assert named(plan_route(servers, Span(0, 4), per_block())) == [("c", 0, 4)]


def test_a_slow_server_is_gone_around():
    servers = [server("a", 0, 2), server("b", 2, 4), server("slow", 0, 4)]
    assert named(plan_route(servers, Span(0, 4), per_block(slow=9.0))) == [("a", 0, 2), ("b", 2, 4)]


def test_a_hop_starts_within_a_span():
    assert named(plan_route([server("a", 0, 3), server("b", 1, 4)], Span(0, 4), per_block())) == [
        ("a", 0, 3),
        ("b", 3, 4),
    ]


def test_a_hole_gives_no_route():
    servers = [server("a", 0, 2), server("b", 3, 4)]
    assert plan_route(servers, Span(0, 4), per_block()) is None
    assert next_hop(servers, Span(0, 4), per_block()) is None
    assert not hold_all(servers, Span(0, 4))
    assert hold_all(servers, Span(0, 2))


spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda span: span[0] < span[1])


@given(st.lists(spans, max_size=8))
def test_a_route_is_contiguous_and_found_exactly_when_every_block_is_held(found):
    servers = [server(f"s{index}", *span) for index, span in enumerate(found)]
    route = plan_route(servers, Span(0, 8), per_block())
    held = {block for start, stop in found for block in range(start, stop)}
    assert (route is not None) == (held == set(range(8)))
    if route is not None:
        assert [block for hop in route for block in range(hop.span.start, hop.span.stop)] == list(range(8))
        assert all(hop.span and hop.span.within(hop.server.span) for hop in route)


@given(st.lists(st.tuples(spans, st.floats(0.1, 10)), max_size=8))
def test_an_index_finds_the_cheapest_of_all_routes(found):
    """Held against trying every way, with every server going on to the end of its span."""
    servers = [server(f"s{index}", *span) for index, (span, _) in enumerate(found)]
    seconds = {f"s{index}": each for index, (_, each) in enumerate(found)}
    cost = per_block(**seconds)

    def cheapest(block: int) -> float:
        if block == 8:
            return 0.0
        ways = [cost(one, one.span.stop - block) + cheapest(one.span.stop) for one in servers if block in one.span]
        return min(ways, default=float("inf"))

    index = RouteIndex(servers, 8)
    index.plan(cost)
    route = index.route(0, cost)
    assert (route is None) == (cheapest(0) == float("inf"))
    if route is not None:
        assert abs(sum(cost(hop.server, hop.blocks) for hop in route) - cheapest(0)) < 1e-6
    assert hold_all(servers, Span(2, 6)) == all(any(b in one.span for one in servers) for b in range(2, 6))


def test_an_index_picks_by_the_costs_of_now_and_leaves_out_who_cannot_be_used():
    servers = [server("a", 0, 2), server("b", 0, 2), server("c", 2, 4)]
    index = RouteIndex(servers, 4)
    index.plan(per_block())
    assert index.next_hop(0, per_block(a=5.0)).server.peer_id == "b"
    assert index.next_hop(0, per_block(b=5.0)).server.peer_id == "a"
    assert index.next_hop(0, per_block(), is_usable=lambda one: one.peer_id == "b").server.peer_id == "b"
    assert index.next_hop(0, per_block(), is_usable=lambda one: False) is None
    assert [one.peer_id for one in index.holders(1)] == ["a", "b"]
