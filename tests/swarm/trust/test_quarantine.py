"""What becomes of servers that are caught: left out, told of, used again only where that is allowed. No network."""

import pytest
import torch

from petals_eval.errors import MissingBlocksError, PeerNondeterministicError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.wire.span import Span
from tests.support.audited_run import BLOCKS, AuditedRun, float32, states
from tests.support.fake_swarm import (
    FakeDirectory,
    FakeTransport,
    ResidualBlocks,
    noise,
    pipeline,
    run,
    run_all,
    server,
    set_pace,
)
from tests.support.tensors import hidden_states

SIZE = 64


def fake_transport(size=SIZE, **dropout):
    """Servers, and of some of them the dropout of each block."""
    blocks = ResidualBlocks(size, nonlinear=False)
    blocks.dropout |= dropout
    return FakeTransport(blocks, seconds=0)


def swarm(transport, *servers, **values):
    directory = FakeDirectory(max(one.span.stop for one in servers), *servers)
    return pipeline(directory, transport, **{"min_backoff": 0.001, "deadline": 2, **values}), directory


# -- training mode


def test_a_server_that_is_caught_is_named_and_left_out_where_others_hold_its_blocks():
    transport = fake_transport(dropping=dict.fromkeys(range(4), 0.1))
    pipe, _ = swarm(
        transport, server("dropping", 0, 4, version="2.2.0"), server("a", 0, 4), server("b", 0, 2), server("c", 2, 4)
    )
    pipe.quarantine.config_dropout = {"hidden_dropout": 0.1}
    quiet, _ = swarm(fake_transport(), server("a", 0, 4))
    batches = [hidden_states(4, 20, SIZE) + index for index in range(30)]
    answers = run_all(pipe, batches)
    for (found, hops), (expected, _) in zip(answers, run_all(quiet, batches), strict=True):
        assert torch.equal(found, expected)
        assert "dropping" not in {hop.peer_id for hop in hops}
    status = pipe.status()
    (finding,) = status.findings
    assert (finding.server.peer_id, finding.is_used) == ("dropping", False)
    assert finding.difference > 0.2
    (notice,) = status.notices
    assert notice == (
        f"warning: server ...opping (blocks 0:4, petals 2.2.0) gave two answers to one question (difference "
        f"{finding.difference:.2g}): its blocks run in training mode (this model's config has hidden_dropout 0.1). "
        "It is left out; 1 other server holds these blocks."
    )


def test_without_another_the_run_stops_at_once_and_says_why_and_how_to_go_on():
    transport = fake_transport(d1={1: 0.1}, d2={1: 0.1})
    servers = server("a", 0, 1), server("d1", 1, 4), server("d2", 1, 2), server("b", 2, 4)
    pipe, _ = swarm(transport, *servers, deadline=60)
    with pytest.raises(MissingBlocksError) as caught:
        run(pipe, hidden_states(4, 20, SIZE))
    assert caught.value.exit_code == 3
    assert caught.value.missing == ((1, 2),)
    message = str(caught.value)
    assert "no server in evaluation mode holds blocks 1:2" in message
    assert "...d1 (blocks 1:4, petals of unknown version) gave two answers to one question" in message
    assert "...d2 (blocks 1:2" in message
    assert "--allow-nondeterministic" in message


def test_somebody_who_has_come_since_the_last_look_is_used_instead():
    pipe, directory = swarm(fake_transport(d={0: 0.1}), server("d", 0, 4))
    newcomer = FakeDirectory(4, server("d", 0, 4), server("a", 0, 4)).snapshot
    directory.on_refresh = lambda directory: setattr(directory, "snapshot", newcomer)
    _, hops = run(pipe, hidden_states(4, 20, SIZE))
    assert [hop.peer_id for hop in hops] == ["a"]


def test_allowed_it_is_used_for_what_nobody_else_holds_and_for_nothing_more():
    pipe, _ = swarm(fake_transport(d={0: 0.1}), server("d", 0, 4), server("a", 2, 4), allow_nondeterministic=True)
    for _ in range(3):
        _, hops = run(pipe, hidden_states(4, 20, SIZE))
    assert [hop.peer_id for hop in hops] == ["d"]  # all of it in one hop: its later blocks are as good as anybody's
    (finding,) = pipe.status().findings
    assert finding.is_used
    (notice,) = pipe.status().notices
    assert notice.endswith("training mode. Nobody else holds these blocks, so it is used all the same.")


def test_a_server_caught_in_mid_run_loses_also_what_is_in_flight():
    transport = fake_transport(640)
    pipe, _ = swarm(transport, server("a", 0, 4), server("b", 0, 4), recheck_share=0.01, deadline=60)
    batches = [hidden_states(4, 64, 640) + index for index in range(200)]
    run_all(pipe, batches[:20])
    assert pipe.status().findings == ()
    transport.blocks.dropout["a"] = dict.fromkeys(range(4), 0.01)
    answers = run_all(pipe, batches)
    (finding,) = pipe.status().findings
    assert finding.server.peer_id == "a"
    assert sum(hops[0].peer_id == "a" for _, hops in answers) < 40  # asked again early, after so much of its own work


# -- wrong answers


def test_a_liar_is_used_no_more_and_what_it_still_answers_is_computed_elsewhere():
    run = AuditedRun(float32("a"), float32("b"), float32("c"))
    run.blocks.spoil["a"] = noise()
    set_pace(run.peers, "a", 1e-9)
    run.go(5)
    assert run.statuses == {"a": "wrong"}
    count = sum(call.peer_id == "a" for call in run.transport.calls)
    answers = run.go(5)
    assert sum(call.peer_id == "a" for call in run.transport.calls) == count
    for seed, (hidden, hops) in enumerate(answers):
        assert {hop.peer_id for hop in hops} <= {"b", "c"}
        assert torch.equal(hidden, run.blocks.truth(states(seed), 0, BLOCKS))


@pytest.mark.parametrize("allow", [False, True])
def test_a_run_stops_where_a_liar_alone_is_left_whatever_is_allowed(allow):
    """--allow-nondeterministic is for training mode."""
    run = AuditedRun(float32("a"), float32("b"), float32("c"), allow_nondeterministic=allow)
    run.blocks.spoil["a"] = noise()
    set_pace(run.peers, "a", 1e-9)
    run.go(5)
    run.hold(float32("a"))
    with pytest.raises(MissingBlocksError, match=r"no server that is trusted holds blocks 0:4") as stopped:
        run.go(1)
    assert "its answers are wrong" in str(stopped.value)
    assert "allow-nondeterministic" not in str(stopped.value)


@pytest.mark.parametrize("dispute_comes", ["before", "after"])
def test_a_dispute_with_a_server_that_was_caught_names_nobody_else(dispute_comes):
    """An audit may end after the server in question was left out for training mode."""
    run = AuditedRun(float32("caught", 0, 4), float32("honest", 0, 2), float32("behind", 2, 4))
    quarantine, servers = run.pipe.quarantine, run.directory.snapshot.servers
    sides = {"caught": ("behind", "honest"), "honest": ("behind", "caught"), "behind": ("caught", "honest")}
    disputes = [
        TrustFinding(servers[name], "disputed", Span(0, 4), 0.1, others=others, is_used=True)
        for name, others in sides.items()
    ]

    def dispute():
        for finding in disputes:
            quarantine.add_dispute(finding)

    if dispute_comes == "before":
        dispute()
        assert run.statuses == dict.fromkeys(sides, "disputed")
    quarantine.add(Hop(servers["caught"], Span(0, 4)), PeerNondeterministicError("two answers", 0.5))
    if dispute_comes == "after":
        dispute()
    assert run.statuses == {"caught": "nondeterministic"}
